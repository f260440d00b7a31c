"""What `LocalLLM` is apart from its endpoints: options, engine, prompts and copies."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from llama_index.core.base.llms.generic_utils import (
    messages_to_prompt as generic_messages_to_prompt,
)
from llama_index.core.base.llms.types import ChatMessage, LLMMetadata, MessageRole, TextBlock
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.constants import DEFAULT_TEMPERATURE
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import default_completion_to_prompt

from engine import check_parser_names
from llm_connectors._gathered import submit_chat
from llm_connectors._params import (
    ALIASES,
    SAMPLING_NAMES,
    Memo,
    SamplingFields,
    check_names,
    memoised,
    resolve_aliases,
)
from llm_connectors._runtime import lease_for
from llm_connectors.llama_index.engine_component import EngineComponent
from llm_connectors.llama_index.errors import ERRORS
from llm_connectors.llama_index.messages import template_messages
from llm_connectors.llama_index.metadata import build_metadata
from llm_connectors.llama_index.options import REQUEST_NAMES, RequestOptions, request_options
from llm_connectors.llama_index.pickling import remember
from llm_connectors.llama_index.prompts import PreparedPrompts, PromptBuilder, fit_window
from llm_connectors.llama_index.requests import PendingAnswer

if TYPE_CHECKING:
    from engine import Engine


class EngineBackedLLM(SamplingFields, EngineComponent, FunctionCallingLLM):
    """Base of `LocalLLM`: its fields, its engine, and how a call becomes a submitted request.

    Raises:
        ConfigError: No model is given, or an engine option is unknown or bad.
        RequestError: A sampling option is unknown or bad.
    """

    model: str = Field(default="", description="As in `engine.EngineConfig.model`.")
    """A Hugging Face folder, a `.gguf` file, a hub id, or "smollm2-135m"."""

    temperature: float = DEFAULT_TEMPERATURE
    """0 is greedy; larger is more varied. Default 0.1, as LlamaIndex's own: answers stay close to
    the retrieved text."""

    stop: str | Sequence[str] | None = None
    """Strings that end the answer and are left out of it. `stop` given with a call replaces
    these."""

    chat_template: str | None = None
    """Jinja source to use instead of the model's own template."""

    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further variables of the chat template."""

    thinking: bool | str | None = None
    """Whether a reasoning model thinks before it answers: `True`, `False`, or an effort ("low",
    "medium", "high") where its template knows efforts. `None` leaves it to the template. The
    reasoning comes in a `ThinkingBlock`, never in the text."""

    tool_parser: str = "auto"
    """How the model writes tool calls, as in `engine.AnswerFormat`: "hermes", "llama3_json",
    "mistral", "pythonic", ... "auto" reads it off the chat template. A name also declares that the
    model can call tools where its template has no place for them: they are then described in the
    system message."""

    reasoning_parser: str = "auto"
    """How the model marks its reasoning, as in `engine.AnswerFormat`."""

    structured_mode: Literal["schema", "tool", "text"] = "schema"
    """How the structured methods ask. "schema": the answer is the JSON, held to the schema while it
    is written. "tool": the same as the arguments of one forced tool call. "text": LlamaIndex's own
    way, which asks in the prompt and parses what comes."""

    context_window: int | None = None
    """Tokens of prompt and answer together that a request may have, at most the engine's own
    limit, which is the default."""

    timeout: float | None = None
    """Seconds after which a request is aborted with `RequestTimeoutError`. Default: none."""

    priority: int = 0
    """Requests with smaller numbers run sooner."""

    cache_salt: str | None = None
    """Requests with different salts share no prefix-cache blocks."""

    additional_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further sampling options by name, as other LlamaIndex classes have it; they win over the
    fields of the same name."""

    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further `engine.EngineConfig` fields by name: `dtype`, `max_model_len`, `device`, ..."""

    _metadata: tuple[Any, LLMMetadata] | None = PrivateAttr(default=None)
    _options_memo: Memo[RequestOptions] | None = PrivateAttr(default=None)

    def __init__(
        self, model: str | None = None, *, engine: Engine | None = None, **options: Any
    ) -> None:
        """Record the options; nothing is loaded.

        Args:
            model: See the field. May be left out where `engine` is given.
            engine: An engine made by the caller, who also closes it.
            **options: Any other field.
        """
        cls = type(self)
        with ERRORS.converting():
            valid_names = (*cls.model_fields, *ALIASES)
            check_names(options.keys(), valid_names, f"{cls.__name__} option")
            options = resolve_aliases(options)
            lease = lease_for(model, options.get("engine_kwargs"), engine)
        if engine is not None:
            options["engine_kwargs"] = lease.options
            remember(lease)
        super().__init__(model=lease.config.model, **options)
        self._lease = lease
        # Bad values are the constructor's news, not the first request's.
        with ERRORS.converting():
            check_parser_names(self.tool_parser, self.reasoning_parser)
        self._options({})

    # ------------------------------------------------------------------ what it can do

    @property
    def metadata(self) -> LLMMetadata:
        """The model's true limits. Loads the model on first use; then a cached object.

        Raises:
            ConfigError: `context_window` is larger than the engine's limit.
        """
        engine = self.engine
        # A weak reference, so that a closed engine can be freed.
        key = (
            weakref.ref(engine),
            self.max_tokens,
            self.context_window,
            self.chat_template,
            self.tool_parser,
        )
        if self._metadata is None or self._metadata[0] != key:
            with ERRORS.converting():
                self._metadata = (key, build_metadata(engine, *key[1:]))
        return self._metadata[1]

    def to_payload(self) -> dict[str, Any]:
        """What instrumentation events carry.

        Never loads the model: events come before requests, and on the async side nothing may block.
        """
        if self._lease.is_loaded:
            return super().to_payload()
        return {"class_name": self.class_name(), "model_name": self.model}

    @property
    def token_fn(self) -> Callable[[str], list[int]]:
        """Token ids of plain text, without BOS: the counter LlamaIndex's splitters want.

        Thread-safe. Markup in the text is not parsed.
        """
        return self._encode

    def _encode(self, text: str) -> list[int]:
        return self.engine.tokenize(text, add_special_tokens=False)

    def count_messages(
        self, messages: Sequence[ChatMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Prompt tokens of a chat with `messages`: exact, through the template.

        Args:
            messages: As for `chat`.
            tools: As for `chat`; they are part of the prompt.
        """
        with ERRORS.converting():
            options = self._options({} if tools is None else {"tools": tools})
            return len(self._prompts(self.engine, options).chats([messages]).prompt_ids[0])

    def _extend_messages(self, messages: list[ChatMessage]) -> list[ChatMessage]:
        """Messages with `system_prompt`: a system message, or the head of the first message."""
        if not self.system_prompt or not messages:
            return super()._extend_messages(messages)
        if self.metadata.system_role == MessageRole.SYSTEM:
            return super()._extend_messages(messages)
        first = messages[0]
        blocks = [TextBlock(text=f"{self.system_prompt}\n"), *first.blocks]
        return [first.model_copy(update={"blocks": blocks}), *messages[1:]]

    # ------------------------------------------------------------------ one request

    def _submit_chat(
        self, engine: Engine, messages: Sequence[ChatMessage], call: dict[str, Any]
    ) -> PendingAnswer:
        return self._submit_chats(engine, [messages], call)[0]

    async def _asubmit_chat(
        self, engine: Engine, messages: Sequence[ChatMessage], call: dict[str, Any]
    ) -> PendingAnswer:
        """`_submit_chat`, together with the other chats that begin in this turn of the loop."""
        with ERRORS.converting():
            options = self._options(call)
            plan = self._prompts(engine, options).chat_plan()
            if plan is None or self.context_window is not None:
                return self._submit_chat(engine, messages, call)
            order = {"priority": options.priority, "cache_salt": options.cache_salt}
            conversation = template_messages(messages)
            prompt, handle = await submit_chat(engine, plan, conversation, order)
            reader = plan.stream(prompt)
            return PendingAnswer(handle, engine.model_name, options.timeout, reader)

    def _submit_completion(
        self, engine: Engine, prompt: str, formatted: bool, call: dict[str, Any]
    ) -> PendingAnswer:
        return self._submit_completions(engine, [prompt], formatted, call)[0]

    def _submit_chats(
        self,
        engine: Engine,
        conversations: Sequence[Sequence[ChatMessage]],
        call: dict[str, Any],
    ) -> list[PendingAnswer]:
        with ERRORS.converting():
            options = self._options(call)
            prompts = self._prompts(engine, options).chats(conversations)
            return self._submit(engine, prompts, options)

    def _submit_completions(
        self, engine: Engine, texts: Sequence[str], formatted: bool, call: dict[str, Any]
    ) -> list[PendingAnswer]:
        with ERRORS.converting():
            options = self._options(call)
            prompts = self._prompts(engine, options).completions(texts, formatted=formatted)
            return self._submit(engine, prompts, options)

    def _submit(
        self, engine: Engine, prompts: PreparedPrompts, options: RequestOptions
    ) -> list[PendingAnswer]:
        all_ids = prompts.prompt_ids
        if not all_ids:
            return []
        params = [fit_window(ids, prompts.params, self.context_window) for ids in all_ids]
        order: dict[str, Any] = {
            "priority": options.priority,
            "cache_salt": options.cache_salt,
        }
        if len(all_ids) == 1:
            handles = [engine.submit(all_ids[0], params[0], **order)]
        else:
            handles = engine.submit_many(all_ids, params, **order)
        return [
            PendingAnswer(handle, engine.model_name, options.timeout, reader)
            for handle, reader in zip(handles, prompts.readers(), strict=True)
        ]

    def _prompts(self, engine: Engine, options: RequestOptions) -> PromptBuilder:
        return PromptBuilder(
            engine=engine,
            options=options,
            messages_to_prompt=self.messages_to_prompt or generic_messages_to_prompt,
            completion_to_prompt=self.completion_to_prompt or default_completion_to_prompt,
        )

    def _options(self, call: dict[str, Any]) -> RequestOptions:
        with ERRORS.converting():
            check_names(self.additional_kwargs, (*SAMPLING_NAMES, *ALIASES), "additional_kwargs")
            fields = self.sampling_values()
            fields |= {name: getattr(self, name) for name in REQUEST_NAMES}
            fields |= resolve_aliases(self.additional_kwargs)
            if call:
                return request_options(fields, call)
            memo = memoised(self._options_memo, fields, lambda values: request_options(values, {}))
            self._options_memo = memo
            return memo[1]

    # ------------------------------------------------------------------ copies

    def with_options(self, **options: Any) -> Self:
        """A sibling on the same engine with other options; the object itself stays as it is.

        Args:
            **options: Any field but `model` and `engine_kwargs`.
        """
        with ERRORS.converting():
            fixed = ("model", "engine_kwargs")
            valid_names = [name for name in type(self).model_fields if name not in fixed]
            check_names(options.keys(), (*valid_names, *ALIASES), "with_options() option")
            options = resolve_aliases(options)
        kept = {
            name: value
            for name, value in self.additional_kwargs.items()
            if ALIASES.get(name, name) not in options
        }
        sibling = self.model_copy(update={"additional_kwargs": kept, **options})
        sibling._options({})
        return sibling
