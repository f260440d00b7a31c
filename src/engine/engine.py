"""`Engine`: the public face of one loaded model.

One engine is one model on one device with one thread that runs its steps, in this process or in a
child (`EngineConfig.placement`). Any thread and any event loop may use it. Rendering, encoding and
checking happen in the caller's thread; everything after `submit` happens in the engine's.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, overload

from engine.config import EngineConfig, ResolvedConfig
from engine.core.request import Request
from engine.errors import RequestError
from engine.hand_over import HandOver
from engine.handle import RequestHandle
from engine.outputs import Delta, RequestOutput
from engine.placement.host import EXIT_TIMEOUT_S, start_host
from engine.pooling_face import PoolingFace
from engine.progress import wait_for_all
from engine.prompts import Prompt, RequestFactory, is_one_prompt, params_per_prompt
from engine.sampling_params import SamplingParams
from engine.shared import SharedEngines
from engine.stats import EngineStats
from engine.text.answer_format import AnswerFormat, AnswerFormats
from engine.text.chat_template import ChatTemplate
from engine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Messages = Sequence[dict[str, Any]]

_shared_engines = SharedEngines()


class Engine(PoolingFace):
    """A loaded model that batches every request made of it, from whatever thread or event loop.

    Loading happens in the constructor and blocks. Use it as a context manager, or `close` it.

    Args:
        model: Folder, `.gguf` file, packaged model or hub id; see `EngineConfig.model`.
        config: Ready-made options, instead of keywords.
        **options: Fields of `EngineConfig`.

    Raises:
        ConfigError: Unknown or impossible options.
        ModelNotFoundError: The name leads nowhere.
        UnsupportedModelError: Architecture or checkpoint cannot be run.
        CapacityError: The model does not fit.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        config: EngineConfig | None = None,
        **options: Any,
    ) -> None:
        if config is None:
            if model is not None:
                options["model"] = model
            config = EngineConfig.from_kwargs(**options)
        elif model is not None or options:
            msg = "Give either config=… or a model name with options, not both."
            raise TypeError(msg)
        self.config = config
        host = start_host(config)
        self._host = host
        facts = host.facts
        self._factory = RequestFactory(
            facts.limits,
            host.text,
            facts.vocab_size,
            config.seed,
            can_generate=not facts.pooling,
            has_many_threads=facts.device.startswith("cuda"),
        )
        # Runs when the engine is collected, and at interpreter exit if it still is alive.
        self._finalizer = weakref.finalize(self, host.stop, drain=False, timeout=EXIT_TIMEOUT_S)
        self._answer_formats = AnswerFormats(host.text.model_type)
        self._close_lock = threading.Lock()
        self._release_shared: Callable[[], bool] | None = None
        logger.info(
            "Engine %s ready in %.1f s: %s, %s, %d KV blocks of %d tokens",
            config.model,
            host.facts.start_s,
            host.facts.device,
            host.facts.dtype,
            host.facts.limits.num_usable_blocks,
            host.facts.limits.block_size,
        )

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else self._host.facts.device
        return f"<Engine {self.config.model!r} {state}>"

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # After an error nobody waits for the rest.
        self.close(drain=exc_type is None)

    # ---------------------------------------------------------------- what it is

    @property
    def model_name(self) -> str:
        """The name it was loaded by."""
        return self.config.model

    @property
    def resolved_config(self) -> ResolvedConfig:
        """What the options came to on this machine."""
        return self._host.resolved_config

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together that one request may have."""
        return self._host.facts.limits.max_model_len

    @property
    def vocab_size(self) -> int:
        """Token ids of the model: 0 to `vocab_size` - 1."""
        return self._host.facts.vocab_size

    @property
    def has_chat_template(self) -> bool:
        """True where `chat` works without passing a template."""
        return self._host.text.chat_template is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            RequestError: The model has none.
        """
        return self._need_tokenizer()

    @property
    def is_closed(self) -> bool:
        """True once no more requests are accepted."""
        return not self._host.is_alive

    def stats(self) -> EngineStats:
        """Counts and rates up to now. Any thread.

        Costs microseconds; with `placement="process"` a question to the child, about 0.2 ms.
        """
        return self._host.stats()

    # ---------------------------------------------------------------- text

    def tokenize(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Token ids of `text`.

        Args:
            text: Any string without lone surrogates.
            add_special_tokens: Add what the model expects around a text, such as BOS.
            parse_special: Read control tokens written in `text` as such, not as text.
        """
        return self._need_tokenizer().encode(
            text, add_special_tokens=add_special_tokens, parse_special=parse_special
        )

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self._need_tokenizer().decode(token_ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Messages,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **template_kwargs: Any,
    ) -> list[int]:
        """Token ids of a conversation, as the model was trained to see it; exactly one BOS.

        Args:
            messages: Dicts with "role" and "content".
            tools: JSON descriptions of tools, for templates that know them.
            add_generation_prompt: End with the opening of the assistant's turn. Default: yes,
                unless `continue_final_message` is set.
            continue_final_message: Leave the last message open, to be continued.
            chat_template: Jinja source to use instead of the model's.
            **template_kwargs: Further variables of the template.

        Raises:
            RequestError: Messages are malformed, or the template refuses them or is missing.
        """
        return self._template(chat_template).encode(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **template_kwargs,
        )

    def apply_chat_template_batch(
        self,
        conversations: Sequence[Messages],
        *,
        chat_template: str | None = None,
        **template_options: Any,
    ) -> list[list[int]]:
        """`apply_chat_template` of each conversation; encoded together, faster than one by one."""
        return self._template(chat_template).encode_batch(conversations, **template_options)

    def answer_format(
        self,
        chat_template: str | None = None,
        tool_parser: str = "auto",
        reasoning_parser: str = "auto",
    ) -> AnswerFormat:
        """How this model is shown tools and its answers are read; arguments as `AnswerFormat`'s."""
        wanted = (chat_template, tool_parser, reasoning_parser)
        return self._answer_formats.get(self._template, *wanted)

    def _need_tokenizer(self) -> Tokenizer:
        tokenizer = self._host.text.tokenizer
        if tokenizer is None:
            msg = f"{self.config.model!r} has no tokenizer; prompts and outputs are token ids."
            raise RequestError(msg)
        return tokenizer

    def _template(self, source: str | None) -> ChatTemplate:
        if source is not None:
            return ChatTemplate(source, self._need_tokenizer())
        template = self._host.text.chat_template
        if template is None:
            msg = (
                f"{self.config.model!r} has no chat template. Pass chat_template=…, or use "
                "generate with a plain prompt."
            )
            raise RequestError(msg)
        return template

    # ---------------------------------------------------------------- requests

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        parse_special: bool = False,
    ) -> RequestHandle:
        """Start one request and return at once. Any thread.

        Args:
            prompt: Text or token ids.
            params: Default `SamplingParams()`.
            request_id: For logs and outputs; made up if missing.
            priority: Smaller runs sooner.
            cache_salt: Prefix-cache blocks are shared only between requests with equal salts.
            parse_special: Read control tokens written in `prompt` as such. Off, because text of
                unknown origin must not be able to end its own turn.

        Raises:
            RequestError: Prompt or options are malformed.
            ContextOverflowError: Prompt and answer exceed `max_model_len`.
            CapacityError: They exceed the KV cache.
            EngineClosedError: The engine was closed.
            EngineDeadError: The engine ended with an error.
        """
        request = self._factory.make(
            prompt,
            SamplingParams() if params is None else params,
            request_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
            parse_special=parse_special,
        )
        return self._hand_over([request])[0]

    def submit_many(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        parse_special: bool = False,
    ) -> list[RequestHandle]:
        """Start several requests in one hand-over: the next step sees all of them.

        A long list goes over in pieces while other threads keep the interpreter (see `HandOver`).
        All or none: if one prompt is bad, none is started, or those that were are aborted.

        Raises:
            RequestError: As `submit`, naming the prompt's place in the list.
        """
        requests: list[Request] = []
        handles: list[RequestHandle] = []
        all_params = params_per_prompt(params, len(prompts))
        encoded = self._factory.encode_together(prompts, parse_special)
        hand_over = HandOver()
        index = 0
        try:
            for index, (prompt, one) in enumerate(zip(prompts, all_params, strict=True)):
                requests.append(
                    self._factory.make(
                        prompt,
                        one,
                        request_id=None,
                        priority=priority,
                        cache_salt=cache_salt,
                        parse_special=parse_special,
                        token_ids=encoded.get(index),
                    )
                )
                if hand_over.is_due(len(requests)):
                    handles += self._hand_over(requests)
                    requests = []
            return handles + self._hand_over(requests)
        except BaseException as error:
            if isinstance(error, RequestError):
                error.add_note(f"This was prompt {index} of {len(prompts)}.")
            for handle in handles:
                handle.abort()
            raise

    def _hand_over(self, requests: list[Request]) -> list[RequestHandle]:
        # A handle keeps its engine alive: `Engine(…).submit(…).result()` works.
        on_abort, on_stream = self._abort, self._start_stream
        handles = [RequestHandle(request, on_abort, on_stream) for request in requests]
        if requests:
            self._host.post_submit(list(zip(requests, handles, strict=True)))
        return handles

    def _abort(self, request: Request) -> None:
        self._host.post_abort(request)

    def _start_stream(self, request: Request) -> None:
        self._host.post_stream(request)

    @overload
    def generate(
        self,
        prompts: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        use_tqdm: bool = False,
        **submit_options: Any,
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        **submit_options: Any,
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        **submit_options: Any,
    ) -> RequestOutput | list[RequestOutput]:
        """Answers to one prompt or to a list of them, in order; blocks until all are there.

        Args:
            prompts: A string, a list of token ids, or a list of either.
            params: For all prompts, or one for each.
            use_tqdm: Show a progress bar with tokens per second.
            **submit_options: As in `submit_many`.

        Raises:
            RequestError: As `submit`.
            EngineError: What ended a request instead of an output; the others are aborted, as
                they are on `KeyboardInterrupt`. The engine goes on.
        """
        if is_one_prompt(prompts):
            return self._generate_all([prompts], params, use_tqdm, submit_options)[0]
        return self._generate_all(list(prompts), params, use_tqdm, submit_options)

    def _generate_all(
        self, prompts: list[Any], params: Any, use_tqdm: bool, submit_options: dict[str, Any]
    ) -> list[RequestOutput]:
        return wait_for_all(self.submit_many(prompts, params, **submit_options), use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        priority: int = 0,
        cache_salt: str | None = None,
        **template_options: Any,
    ) -> Any:
        """The assistant's answer to one conversation, or to each of a list of them.

        Args:
            messages: A list of message dicts, or a list of such lists.
            params: For all conversations, or one for each.
            use_tqdm: Show a progress bar.
            priority: As in `submit`.
            cache_salt: As in `submit`.
            **template_options: As in `apply_chat_template`.

        Returns:
            A `RequestOutput`, or a list of them for a list of conversations.
        """
        self._factory.check_can_generate()
        is_single = len(messages) == 0 or not isinstance(messages[0], list | tuple)
        conversations: Any = [messages] if is_single else messages
        prompts = self.apply_chat_template_batch(conversations, **template_options)
        outputs = self._generate_all(
            prompts, params, use_tqdm, {"priority": priority, "cache_salt": cache_salt}
        )
        return outputs[0] if is_single else outputs

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **submit_options: Any
    ) -> Iterator[Delta]:
        """Deltas of one request as they come; leaving the loop early aborts it."""
        return iter(self.submit(prompt, params, **submit_options))

    def reset_prefix_cache(self) -> None:
        """Forget all cached prompt prefixes, for instance between two measurements.

        Takes effect before the next request; running requests keep their blocks.
        """
        self._host.post_reset_prefix_cache()

    # ---------------------------------------------------------------- life

    @classmethod
    def shared(cls, model: str, **options: Any) -> Engine:
        """The process-wide engine of `model`: loaded at the first call, the same object after it.

        Every call takes a reference that one `close` gives back; the last one closes the engine.
        Two threads asking at once load once.

        Raises:
            ConfigError: The model is loaded with other options; the message names them.
        """
        config = EngineConfig.from_kwargs(model=model, **options)
        return _shared_engines.acquire(config, lambda: cls(config=config), _mark_shared)

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Stop accepting requests and give everything back. Idempotent.

        For a shared engine this gives back one reference; the last one really closes.

        Args:
            drain: Finish the requests that were submitted. Otherwise they end with
                `EngineClosedError`.
            timeout: Seconds to wait for that; after them the rest ends with `EngineClosedError`.
        """
        with self._close_lock:
            if self._release_shared is not None and not self._release_shared():
                return
            self._host.stop(drain=drain, timeout=timeout)
            self._finalizer.detach()


def _mark_shared(engine: Engine, release: Callable[[], bool]) -> None:
    engine._release_shared = release
