"""A stand-in for `engine.Engine`: same face, own thread, words instead of a model.

Each step gives every running request its next word, so batching, streaming, aborts and timings
can be watched without weights. The handle is the engine's own.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import jinja2

from engine import (
    CompletionOutput,
    ContextOverflowError,
    Delta,
    EngineClosedError,
    EngineConfig,
    Logprob,
    RequestError,
    RequestHandle,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    Usage,
)
from engine.handle import wake_loops
from engine.text.answer_format import AnswerFormat

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + CHATML
)
BOS_ID = 1
_SPECIAL = re.compile(r"(<\|\w+\|>|<s>)")
_WORD = re.compile(r"\s*\S{1,8}|\s+")


def echo(prompt: str, params: SamplingParams) -> str:
    """Answer that depends on the whole prompt: its length and its last word."""
    words = prompt.replace("<|im_end|>", " ").replace("<|im_start|>assistant", " ").split()
    return f"Seen {len(words)} words, the last was {words[-1] if words else 'nothing'}."


@dataclasses.dataclass(eq=False)
class FakeRequest:
    """One submitted prompt, and what became of it."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    kwargs: dict[str, Any]
    pieces: list[str]
    finish_reason: str
    stop_reason: str | None
    metrics: RequestMetrics
    handle: RequestHandle | None = None
    num_done: int = 0
    num_streamed: int = 0
    is_streaming: bool = False
    is_aborted: bool = False


class FakeEngine:
    """See the module. `answer(prompt_text, params)` gives the text of each answer."""

    _shared: ClassVar[dict[str, FakeEngine]] = {}
    num_made: ClassVar[int] = 0

    def __init__(
        self,
        model: str = "fake",
        *,
        answer: Callable[[str, SamplingParams], str] = echo,
        template: str | None = CHATML,
        has_bos: bool = True,
        step_s: float = 0.0005,
        **options: Any,
    ) -> None:
        type(self).num_made += 1
        self.config = EngineConfig.from_kwargs(model=model, **options)
        self.model_name = model
        self.max_model_len = self.config.max_model_len or 4096
        self.answer = answer
        self.template = template
        self.has_bos = has_bos
        self.requests: list[FakeRequest] = []
        self.num_hand_overs = 0
        self.peak_running = 0
        self.num_aborted = 0
        self.step_s = step_s
        self.references = 0
        self.is_closed = False
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._work = threading.Event()
        self._running: list[FakeRequest] = []
        self._word_to_id: dict[str, int] = {"<s>": BOS_ID}
        self._id_to_word: dict[int, str] = {BOS_ID: "<s>"}
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    # ---- registry

    @classmethod
    def shared(cls, model: str, **options: Any) -> FakeEngine:
        engine = cls._shared.get(model)
        if engine is None or engine.is_closed:
            engine = cls._shared[model] = cls(model, **options)
        engine.references += 1
        return engine

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        self.references -= 1
        if self.references > 0 or self.is_closed:
            return
        self.is_closed = True
        with self._lock:
            failed, self._running = self._running, []
        for request in failed:
            error = EngineClosedError("The engine was closed.")
            wake_loops(request.handle.publish(error=error))
        self._work.set()

    # ---- text

    @property
    def has_chat_template(self) -> bool:
        return self.template is not None

    def tokenize(
        self, text: str, add_special_tokens: bool = True, parse_special: bool = False
    ) -> list[int]:
        parts = _SPECIAL.split(text) if parse_special else [text]
        words: list[str] = []
        for part in parts:
            words += [part] if parse_special and _SPECIAL.fullmatch(part) else _WORD.findall(part)
        # A word of plain text is another token than the markup it may look like.
        keys = [
            word if parse_special or not _SPECIAL.fullmatch(word) else f"\0{word}" for word in words
        ]
        with self._lock:
            ids = [self._word_to_id.setdefault(key, len(self._word_to_id) + 1) for key in keys]
            self._id_to_word |= dict(zip(ids, words, strict=True))
        return [BOS_ID, *ids] if add_special_tokens and self.has_bos else ids

    def detokenize(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(self._id_to_word[token_id] for token_id in ids)

    @property
    def tokenizer(self) -> Any:
        return SimpleNamespace(special_tokens=("<|im_start|>", "<|im_end|>", "<s>"))

    @property
    def resolved_config(self) -> Any:
        return SimpleNamespace(block_size=16, enable_prefix_caching=True)

    def answer_format(
        self,
        chat_template: str | None = None,
        tool_parser: str = "auto",
        reasoning_parser: str = "auto",
    ) -> AnswerFormat:
        source = chat_template or self.template
        if source is None:
            raise RequestError("The model has no chat template.")
        return _format(source, tool_parser, reasoning_parser)

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: Any = None,
        chat_template: str | None = None,
        **variables: Any,
    ) -> list[int]:
        source = chat_template or self.template
        if source is None:
            raise RequestError("The model has no chat template.")
        text = _compiled(source).render(messages=messages, tools=tools, **variables)
        ids = self.tokenize(text, add_special_tokens=False, parse_special=True)
        return [BOS_ID, *ids] if self.has_bos else ids

    def apply_chat_template_batch(self, conversations: Any, **options: Any) -> list[list[int]]:
        return [self.apply_chat_template(messages, **options) for messages in conversations]

    # ---- requests

    def submit(
        self, prompt: str | list[int], params: SamplingParams | None = None, **kwargs: Any
    ) -> RequestHandle:
        return self.submit_many([prompt], params, **kwargs)[0]

    def submit_many(
        self,
        prompts: Sequence[str | list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        parse_special: bool = False,
    ) -> list[RequestHandle]:
        if self.is_closed:
            raise EngineClosedError("The engine is closed.")
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        kwargs = {"priority": priority, "cache_salt": cache_salt}
        made = [
            self._make(prompt, one, kwargs, parse_special)
            for prompt, one in zip(prompts, params, strict=True)
        ]
        with self._lock:
            self.num_hand_overs += 1
            self.requests += made
            self._running += made
        self._work.set()
        return [request.handle for request in made if request.handle]

    def stats(self) -> Any:
        return SimpleNamespace(
            running=len(self._running),
            peak_running=self.peak_running,
            requests_aborted=self.num_aborted,
        )

    def _make(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        kwargs: dict[str, Any],
        parse_special: bool,
    ) -> FakeRequest:
        ids = self.tokenize(prompt, True, parse_special) if isinstance(prompt, str) else prompt
        if len(ids) + (params.max_tokens or 1) > self.max_model_len:
            raise ContextOverflowError(
                f"The prompt has {len(ids)} tokens, max_tokens={params.max_tokens}, "
                f"the limit is {self.max_model_len}."
            )
        text = self.answer(self.detokenize(ids), params)
        stop_reason = None
        for stop in params.stop or ():
            if stop in text:
                text, stop_reason = text[: text.index(stop)], stop
        pieces = _WORD.findall(text)
        finish_reason = "stop"
        if params.max_tokens is not None and len(pieces) > params.max_tokens:
            pieces, finish_reason = pieces[: params.max_tokens], "length"
        request = FakeRequest(
            request_id=f"fake-{next(self._ids)}",
            prompt_ids=list(ids),
            params=params,
            kwargs=kwargs,
            pieces=pieces,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            metrics=RequestMetrics(arrival_s=time.monotonic()),
        )
        request.handle = RequestHandle(request, self._on_abort, self._on_stream)  # type: ignore[arg-type]
        return request

    def _on_abort(self, request: FakeRequest) -> None:
        request.is_aborted = True
        self._work.set()

    def _on_stream(self, request: FakeRequest) -> None:
        request.is_streaming = True

    def _loop(self) -> None:
        while not self.is_closed:
            with self._lock:
                running = list(self._running)
            if not running:
                self._work.wait(0.05)
                self._work.clear()
                continue
            self.peak_running = max(self.peak_running, len(running))
            time.sleep(self.step_s)
            futures = []
            for request in running:
                futures += self._advance(request)
            wake_loops(futures)

    def _advance(self, request: FakeRequest) -> list[Any]:
        if not request.is_aborted and request.num_done < len(request.pieces):
            request.num_done += 1
        is_done = request.is_aborted or request.num_done >= len(request.pieces)
        deltas = []
        if request.is_streaming:
            deltas = [self._delta(request, request.num_streamed)]
            request.num_streamed = request.num_done
        if not is_done:
            return request.handle.publish(deltas=deltas)
        with self._lock:
            # `close` may have taken it meanwhile.
            if request in self._running:
                self._running.remove(request)
        self.num_aborted += request.is_aborted
        request.metrics.finished_s = time.monotonic()
        output = self._output(request)
        if deltas:
            deltas[0].finish_reason = output.outputs[0].finish_reason
            deltas[0].stop_reason = output.outputs[0].stop_reason
            deltas[0].usage, deltas[0].metrics = output.usage, output.metrics
        return request.handle.publish(deltas=deltas, output=output)

    def _delta(self, request: FakeRequest, start: int) -> Delta:
        pieces = request.pieces[start : request.num_done]
        ids = [hash(piece) % 1000 for piece in pieces]
        return Delta(
            index=0, text="".join(pieces), token_ids=ids, logprobs=_logprobs(request, pieces, ids)
        )

    def _output(self, request: FakeRequest) -> RequestOutput:
        whole = self._delta(request, 0)
        answer = CompletionOutput(
            index=0,
            text=whole.text,
            token_ids=whole.token_ids,
            finish_reason="abort" if request.is_aborted else request.finish_reason,  # type: ignore[arg-type]
            stop_reason=request.stop_reason,
            logprobs=whole.logprobs,
        )
        return RequestOutput(
            request_id=request.request_id,
            prompt=None,
            prompt_token_ids=request.prompt_ids,
            outputs=[answer],
            usage=Usage(len(request.prompt_ids), request.num_done),
            metrics=request.metrics,
        )


def _logprobs(
    request: FakeRequest, pieces: list[str], ids: list[int]
) -> list[dict[int, Logprob]] | None:
    if request.params.logprobs is None:
        return None
    rows = []
    for piece, token_id in zip(pieces, ids, strict=True):
        row = {token_id: Logprob(-0.5, 2, piece)}
        for rank in range(1, request.params.logprobs + 1):
            row.setdefault(5000 + rank, Logprob(-0.1 * rank, rank, f"alt{rank}"))
        rows.append(row)
    return rows


@functools.cache
def _format(source: str, tool_parser: str, reasoning_parser: str) -> AnswerFormat:
    known = ("enable_thinking", "thinking", "reasoning_effort")
    template = SimpleNamespace(
        all_sources=source,
        supports_tools="tools" in source,
        supports_system_role="no system role" not in source,
        variables=frozenset(name for name in known if name in source),
        render=lambda messages, **variables: _compiled(source).render(
            messages=messages, **variables
        ),
    )
    return AnswerFormat(template, tool_parser=tool_parser, reasoning_parser=reasoning_parser)  # type: ignore[arg-type]


@functools.cache
def _compiled(source: str) -> jinja2.Template:
    environment = jinja2.Environment(autoescape=False)
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(source)


def _raise_exception(message: str) -> None:
    raise RequestError(f"The chat template refuses the messages: {message}")
