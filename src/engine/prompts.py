"""From what a caller submits to a checked `Request`. Runs in the caller's thread."""

from __future__ import annotations

import itertools
import random
import time
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.constraints.compiler import ConstraintCompiler
from engine.core.capacity import CapacityLimits
from engine.core.pieces import joined, pieces
from engine.core.request import Request
from engine.core.request import Sequence as TokenSequence
from engine.errors import RequestError
from engine.model_text import ModelText
from engine.outputs import RequestMetrics
from engine.runner.sampling_rules import check_params, needs_host_sync
from engine.sampling_params import SamplingParams

Prompt = str | Sequence[int]

_NO_IDS: frozenset[int] = frozenset()

_request_numbers = itertools.count()


class RequestFactory:
    """Checks prompts and options and makes requests of them. Thread-safe: it only reads.

    Args:
        limits: What fits.
        text: Tokenizer and end-of-sequence ids.
        vocab_size: Ids of the model.
        base_seed: Base of the seeds of requests without one; None takes them from the system.
        can_generate: False for a model that embeds or scores: every request is then refused.
        has_many_threads: As `ConstraintCompiler` wants it.
    """

    def __init__(
        self,
        limits: CapacityLimits,
        text: ModelText,
        vocab_size: int,
        base_seed: int | None,
        *,
        can_generate: bool = True,
        has_many_threads: bool = False,
    ) -> None:
        self._can_generate = can_generate
        self._limits = limits
        self._tokenizer = text.tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(text.eos_token_ids)
        self._base_seed = base_seed
        self._compiler = ConstraintCompiler(
            text.tokenizer,
            vocab_size,
            text.eos_token_ids,
            has_many_threads=has_many_threads,
        )
        self._seed_numbers = itertools.count()
        # Begun by the system's randomness. Asking that for each request gives up the GIL each time.
        self._random = random.Random()

    def make(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None,
        priority: int,
        cache_salt: str | None,
        parse_special: bool,
        token_ids: list[int] | None = None,
    ) -> Request:
        """A request ready to be scheduled.

        Args:
            prompt: As in `Engine.submit`, like the other options.
            params: Options.
            request_id: None makes one up.
            priority: Smaller runs sooner.
            cache_salt: See `Request`.
            parse_special: For a prompt that is text.
            token_ids: Of a prompt that is text, from `encode_together`.

        Raises:
            RequestError: Prompt or options are malformed.
            ConstraintError: The constraint cannot be enforced, or not within `max_tokens`.
            ContextOverflowError: Prompt and answer exceed the context.
            CapacityError: They exceed the KV cache.
        """
        arrival_s = time.monotonic()
        self.check_can_generate()
        if not isinstance(params, SamplingParams):
            msg = f"params must be a SamplingParams, got {type(params).__name__}."
            raise RequestError(msg)
        _check_plain("priority", priority, int)
        if cache_salt is not None:
            _check_plain("cache_salt", cache_salt, str)
        prompt_array = None
        if token_ids is None and isinstance(prompt, str):
            token_ids = self._encode(prompt, parse_special)
        elif token_ids is None:
            prompt_array = check_token_ids(prompt, self._vocab_size)
            token_ids = _plain_list(prompt, prompt_array)
        self._check_params(params)
        max_total_tokens = self._limits.check_fits(len(token_ids), params.max_tokens)
        request = Request(
            request_id=request_id or f"request-{next(_request_numbers)}",
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=token_ids,
            params=params,
            stop_token_ids=self._stop_token_ids(params),
            max_total_tokens=max_total_tokens,
            seed=self._seed(params),
            priority=priority,
            cache_salt=cache_salt,
            bad_words_ids=self._bad_words_ids(params),
            constraint=self._compiler.compile(params),
            metrics=RequestMetrics(arrival_s=arrival_s),
        )
        if prompt_array is None:
            request.prompt_array()  # here, not in the engine's thread
        else:
            request.set_prompt_array(prompt_array)
        if request.constraint is not None:
            request.constraint.check_room(max_total_tokens - len(token_ids))
        add_sequences(request)
        return request

    def check_can_generate(self) -> None:
        """Refuse what the loaded model cannot do.

        Raises:
            RequestError: It embeds or scores.
        """
        if not self._can_generate:
            msg = (
                "This engine embeds or scores texts and cannot generate. Use Engine.embed or "
                "Engine.score, or load a model that generates."
            )
            raise RequestError(msg)

    def encode_together(
        self, prompts: Sequence[Prompt], parse_special: bool
    ) -> dict[int, list[int]]:
        """Place -> token ids of the prompts that are text, which is faster than one by one.

        Prompts that `make` will refuse are left to it.
        """
        texts = {
            index: prompt
            for index, prompt in enumerate(prompts)
            if isinstance(prompt, str) and prompt
        }
        if self._tokenizer is None or len(texts) < 2:
            return {}
        try:
            encoded = self._tokenizer.encode_batch(
                list(texts.values()), parse_special=parse_special
            )
        except RequestError:
            return {}
        return dict(zip(texts, encoded, strict=True))

    def _encode(self, prompt: str, parse_special: bool) -> list[int]:
        if not prompt:
            msg = "The prompt is empty. Give at least one character or token id."
            raise RequestError(msg)
        if self._tokenizer is None:
            msg = "This model has no tokenizer. Submit the prompt as a list of token ids."
            raise RequestError(msg)
        return self._tokenizer.encode(prompt, parse_special=parse_special)

    def _check_params(self, params: SamplingParams) -> None:
        check_params(params, self._vocab_size)
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(params, name)
            if count is not None and count > self._vocab_size:
                msg = f"{name}={count} asks for more tokens than the {self._vocab_size} there are."
                raise RequestError(msg)
        if self._tokenizer is None and (params.stop or params.bad_words):
            msg = (
                "stop and bad_words are text, and this model has no tokenizer. "
                "Use stop_token_ids or logit_bias."
            )
            raise RequestError(msg)

    def _bad_words_ids(self, params: SamplingParams) -> Sequence[list[int]]:
        """Each word as it is spelled at the start of a line and after a space."""
        if not params.bad_words or self._tokenizer is None:
            return ()
        found: list[list[int]] = []
        for word in params.bad_words:
            for text in (word.lstrip(), " " + word.lstrip()):
                ids = self._tokenizer.encode(text, add_special_tokens=False)
                if ids and ids not in found:
                    found.append(ids)
        return found

    def _stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        eos_token_ids = _NO_IDS if params.ignore_eos else self._eos_token_ids
        if not params.stop_token_ids:
            return eos_token_ids
        return eos_token_ids.union(params.stop_token_ids)

    def _seed(self, params: SamplingParams) -> int:
        if params.seed is not None:
            return params.seed & ((1 << 64) - 1)
        if self._base_seed is None:
            return self._random.getrandbits(64)
        return (self._base_seed * 0x9E3779B1 + next(self._seed_numbers)) & ((1 << 64) - 1)


def add_sequences(request: Request) -> None:
    """Give a new request its `n` sequences."""
    is_host_synced = needs_host_sync(request.bad_words_ids) or request.constraint is not None
    request.sequences = [
        TokenSequence(request, index, needs_host_sync=is_host_synced)
        for index in range(request.params.n)
    ]
    if request.constraint is not None:
        max_tokens = request.max_total_tokens - request.num_prompt_tokens
        for seq in request.sequences:
            seq.constraint = request.constraint.start(request.params, max_tokens)


def check_token_ids(prompt: Any, vocab_size: int) -> npt.NDArray[np.int32]:
    """`prompt` as an array [num_prompt_tokens] of token ids, all of them in the vocabulary.

    Keeps the GIL, however long the prompt is: a list of a thousand prompts is made beside whatever
    the application computes, and each time that the GIL is given up costs 5 ms per busy thread.

    Raises:
        RequestError: It is empty, no sequence of integers, or an id is out of range.
    """
    if isinstance(prompt, Mapping | bytes) or not isinstance(prompt, Sequence | np.ndarray):
        msg = f"A prompt is a string or a list of token ids, got {type(prompt).__name__}."
        raise RequestError(msg)
    if len(prompt) == 0:
        msg = "The prompt is empty. Give at least one character or token id."
        raise RequestError(msg)
    ids = _plain_ids(prompt)
    if ids is None or not _are_in_vocabulary(ids, vocab_size):
        found = _integers(prompt)
        _refuse_outsiders(found, vocab_size)
        ids = joined([found[piece].astype(np.int32) for piece in pieces(len(found))])
    return ids


def _plain_ids(prompt: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[np.int32] | None:
    """A plain list of ints as an array; None where it is not quite that.

    For those twice as fast as NumPy, which looks at all types first.
    """
    if type(prompt) is not list or type(prompt[0]) is not int:
        return None
    try:
        # From bytes: the view of an array is three objects that Python's collector walks.
        return np.frombuffer(array("i", prompt).tobytes(), np.int32)
    except (TypeError, OverflowError):
        return None


def _are_in_vocabulary(ids: npt.NDArray[np.int32], vocab_size: int) -> bool:
    """Whether all of `ids` are at least 0 and below `vocab_size`. Keeps the GIL."""
    unsigned = ids.view(np.uint32)  # below 0 is then above everything
    return all(np.maximum.reduce(unsigned[piece]) < vocab_size for piece in pieces(len(unsigned)))


def _refuse_outsiders(found: npt.NDArray[Any], vocab_size: int) -> None:
    for piece in pieces(len(found)):
        part = found[piece]
        outside = np.flatnonzero((part < 0) | (part >= vocab_size))
        if len(outside):
            place = piece.start + int(outside[0])
            msg = (
                f"prompt[{place}]={int(found[place])} is no token id of this model, "
                f"which has ids 0 to {vocab_size - 1}."
            )
            raise RequestError(msg)


def _integers(prompt: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The numbers of a prompt, whatever integers they are."""
    try:
        found = np.asarray(prompt)
    except (ValueError, OverflowError) as error:
        msg = f"The prompt is no flat list of token ids: {error}."
        raise RequestError(msg) from error
    if found.ndim != 1 or found.dtype.kind not in "iu":
        msg = f"The prompt must be a flat list of integer token ids, got {_shorten(prompt)}."
        raise RequestError(msg)
    return found


def _plain_list(prompt: Any, token_ids: npt.NDArray[np.int32]) -> list[int]:
    """The checked `prompt` as a list of int."""
    # New numbers take five times as long as the sum, which is no int if one of NumPy's is in it.
    is_plain = type(prompt) is list and type(sum(prompt)) is int
    ids: list[int] = prompt.copy() if is_plain else token_ids.tolist()
    return ids


def is_one_prompt(prompts: Any) -> bool:
    """True for a string or a flat list of ids, False for a list of prompts."""
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, np.ndarray):
        return prompts.ndim == 1
    return (
        isinstance(prompts, Sequence)
        and len(prompts) > 0
        and not isinstance(prompts[0], str | Sequence | np.ndarray)
    )


def params_per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    """One `SamplingParams` for each prompt.

    Raises:
        RequestError: A list of another length than the prompts.
    """
    if params is None:
        return [SamplingParams()] * num_prompts
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if not isinstance(params, Sequence):
        msg = f"params must be a SamplingParams or a list of them, got {type(params).__name__}."
        raise RequestError(msg)
    if len(params) != num_prompts:
        msg = (
            f"{len(params)} SamplingParams were given for {num_prompts} prompts. "
            "Give one for all, or one for each."
        )
        raise RequestError(msg)
    return list(params)


def _check_plain(name: str, value: Any, expected: type) -> None:
    if not isinstance(value, expected) or isinstance(value, bool):
        msg = f"{name}={value!r} must be of type {expected.__name__}."
        raise RequestError(msg)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
