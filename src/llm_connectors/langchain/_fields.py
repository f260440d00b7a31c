"""What the chat and the text class have in common: fields, checks, the engine, call options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from langchain_core.language_models import LangSmithParams
from pydantic import Field, PrivateAttr, SecretStr, StrictInt, model_validator

from engine import RequestError, SamplingParams
from llm_connectors._aliases import registered_lease
from llm_connectors._answer_plan import AnswerOptions
from llm_connectors._env import default_model, with_default_options
from llm_connectors._overflow import check_overflow_policy
from llm_connectors._params import (
    ALIASES,
    SAMPLING_NAMES,
    Memo,
    SamplingFields,
    check_names,
    make_sampling_params,
    memoised,
    merge_stop,
    resolve_aliases,
)
from llm_connectors.langchain._engine_holder import EngineHolder
from llm_connectors.langchain._outputs import PROVIDER

if TYPE_CHECKING:
    from engine import Engine
    from llm_connectors._runtime import EngineLease

_ALIASES = {**ALIASES, "model_name": "model"}

_PLAIN_TEXT = AnswerOptions()
_COMMON_OWN = ("on_overflow", "stream_interval")
"""Call options of both classes that the engine knows nothing of."""
_FIELDS_OF_CALLS = ("model", "timeout", "priority", "cache_salt", *_COMMON_OWN)
"""Beside the sampling options and a class's own call options, what `CallOptions` are made of."""


@dataclasses.dataclass(frozen=True, slots=True)
class CallOptions:
    """Everything one call asks for, checked.

    Attributes:
        params: The engine's sampling parameters.
        timeout: Seconds from submit until the request is aborted.
        submit: Further keywords of `Engine.submit`.
        own: Options of the call that the engine does not know (see `_own_call_names`), fields
            filled in.
        model: Name of the model that answers, as told in metadata.
        lease: Access to its engine.
        answer: How a chat model's prompts are made and its answers read.
    """

    params: SamplingParams
    timeout: float | None
    submit: dict[str, Any]
    own: dict[str, Any]
    model: str
    lease: EngineLease
    answer: AnswerOptions = _PLAIN_TEXT

    @property
    def stream_interval(self) -> int | None:
        """Tokens of each piece of a stream; None for pieces as they come."""
        interval = self.own["stream_interval"]
        return None if interval == "auto" else interval


class LocalModelFields(EngineHolder, SamplingFields):
    """Mixin of `ChatLocal` and `LocalLLM`: where the model comes from and how it is called."""

    model: str = Field(default="", frozen=True)
    """Folder, `.gguf` file, hub id or "smollm2-135m". Also accepted as `model_name`. Default: the
    environment's LLM_CONNECTORS_MODEL."""

    on_overflow: str = "error"
    """What becomes of a prompt that leaves no room for `max_tokens`: "error" raises
    `ContextOverflowError`, "truncate_left" leaves out the oldest turns of a conversation (not its
    system messages), or the first tokens of a text."""

    stream_interval: StrictInt | str = "auto"
    """Tokens in each piece of a stream after the first, >= 1. "auto": each token as it comes, and
    more at once where the reader or the machine lags."""

    timeout: float | None = None
    """Seconds a request may take; then it is aborted and `RequestTimeoutError` raised."""

    priority: int = 0
    """Smaller runs sooner; equal ones first come, first served."""

    cache_salt: str | None = None
    """Requests with different salts never share prefix-cache blocks, for tenants kept apart."""

    streaming: bool | None = None
    """`True`: produce tokens one by one even in `invoke`, for callbacks that watch them."""

    max_retries: int | None = None
    """Accepted because code written for hosted models passes it. A call in this process has no
    connection to lose: nothing is retried. See `with_retry`."""

    api_key: SecretStr | None = Field(default=None, exclude=True)
    """Accepted for the same reason. There is nobody to show it to."""

    _params_memo: Memo[SamplingParams] | None = PrivateAttr(default=None)
    _options_memo: Memo[CallOptions] | None = PrivateAttr(default=None)

    _own_call_names: ClassVar[tuple[str, ...]] = ()
    """Fields of the class, beside those of this mixin, that a call may override."""

    # ---------------------------------------------------------------- construction

    @model_validator(mode="before")
    @classmethod
    def _check_options(cls, values: Any) -> Any:
        """Refuse unknown names, which pydantic would drop in silence, and resolve aliases."""
        if not isinstance(values, Mapping):
            return values
        check_names(values, {*cls.model_fields, *_ALIASES}, f"{cls.__name__} option")
        options = resolve_aliases(values, _ALIASES)
        engine = options.get("engine")
        if engine is not None and not options.get("model"):
            options["model"] = engine.model_name
        if engine is None:
            options["model"] = options.get("model") or default_model() or ""
            if isinstance(options.get("engine_kwargs"), Mapping | None):
                options["engine_kwargs"] = with_default_options(options.get("engine_kwargs"))
        return options

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        """Find bad values now, not at the first call. Loads nothing."""
        self._take_lease()
        self._sampling_params({})
        _check_own({name: getattr(self, name) for name in _COMMON_OWN})
        return self

    # ---------------------------------------------------------------- the engine

    @property
    def model_name(self) -> str:
        """The same as `model`."""
        return self.model

    def _engine(self, options: CallOptions | None = None) -> Engine:
        """The engine of this object, or the one a call chose."""
        if options is not None and options.lease is not self._lease:
            return options.lease.get()
        engine = self._lease.get()
        self._on_engine(engine)
        return engine

    async def _aengine(self, options: CallOptions | None = None) -> Engine:
        if options is not None and options.lease is not self._lease:
            return await options.lease.aget()
        engine = await self._lease.aget()
        self._on_engine(engine)
        return engine

    # ---------------------------------------------------------------- one call's options

    def _call_options(
        self, stop: list[str] | None, kwargs: Mapping[str, Any], **own_overrides: Any
    ) -> CallOptions:
        """Check the keywords of a call and put them over the fields.

        Those of a call without any are made once, until a field changes.

        Raises:
            RequestError: A name is unknown, a value is bad, or an unknown model is asked for.
        """
        if kwargs or stop or own_overrides:
            return self._checked_options(stop, {**kwargs, **own_overrides})
        fields = self.sampling_values()
        for name in (*_FIELDS_OF_CALLS, *self._own_call_names):
            fields[name] = getattr(self, name)
        memo = memoised(self._options_memo, fields, lambda _fields: self._checked_options(None, {}))
        if memo[1].lease is not self._lease:  # of the object that this one is a copy of
            memo = (memo[0], self._checked_options(None, {}))
        self._options_memo = memo
        return memo[1]

    def _checked_options(self, stop: list[str] | None, given: dict[str, Any]) -> CallOptions:
        own = {
            name: given.pop(name, getattr(self, name))
            for name in (*_COMMON_OWN, *self._own_call_names)
        }
        _check_own(own)
        timeout = given.pop("timeout", self.timeout)
        submit = {
            "priority": given.pop("priority", self.priority),
            "cache_salt": given.pop("cache_salt", self.cache_salt),
        }
        given.pop("stream", None)  # read by LangChain, which then calls `_stream` or not
        model, lease = self._chosen_model(given)
        answer = self._answer_options(given, own)
        valid_names = (*SAMPLING_NAMES, *_ALIASES, *_COMMON_OWN, *self._own_call_names)
        check_names(given, (*valid_names, "timeout", "priority", "cache_salt"), "call option")
        if stop:
            given["stop"] = merge_stop(stop, given.get("stop"))
        params = self._sampling_params(given)
        return CallOptions(params, timeout, submit, own, model, lease, answer)

    def _answer_options(self, given: dict[str, Any], own: Mapping[str, Any]) -> AnswerOptions:
        """How answers are read, with what it takes out of the call's options.

        Raises:
            RequestError: An option about tools or format is bad.
        """
        return _PLAIN_TEXT

    def _chosen_model(self, given: dict[str, Any]) -> tuple[str, EngineLease]:
        """The model a call asks for, taken out of its options: this object's or a registered one.

        Raises:
            RequestError: It is neither.
        """
        model, lease = self.model, self._lease
        for name in ("model", "model_name"):
            asked = given.pop(name, None)
            if asked is None or asked == self.model:
                continue
            registered = registered_lease(asked) if isinstance(asked, str) else None
            if registered is None:
                msg = (
                    f"{name}={asked!r} is not registered, and this object runs {self.model!r}. "
                    f"Call register_model first, or make another {type(self).__name__}."
                )
                raise RequestError(msg)
            model, lease = asked, registered
        return model, lease

    def _sampling_params(self, given: Mapping[str, Any]) -> SamplingParams:
        """The parameters of a call. Those of a call without options are made once, then reused."""
        fields = self.sampling_values()
        if given:
            return make_sampling_params(fields, given)
        memo = memoised(self._params_memo, fields, make_sampling_params)
        self._params_memo = memo
        return memo[1]

    # ---------------------------------------------------------------- identity

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """What the answer depends on. LangChain's caches and traces use it.

        The constructor's `stop` has a name of its own because LangChain writes the call's `stop`
        over that key, and two objects with different stops must not share cache entries.
        """
        fields = self.sampling_values()
        values = {name: value for name, value in fields.items() if value is not None}
        values["constructor_stop"] = values.pop("stop", None)
        return {
            "model": self.model,
            "engine_kwargs": self._lease.options,
            "on_overflow": self.on_overflow,
            **values,
        }

    def _fill_ls_params(
        self, params: LangSmithParams, stop: list[str] | None, kwargs: Mapping[str, Any]
    ) -> LangSmithParams:
        """Complete LangSmith parameters: our provider's name and all stop strings."""
        params["ls_provider"] = PROVIDER
        params["ls_model_name"] = kwargs.get("model") or kwargs.get("model_name") or self.model
        all_stops = merge_stop(self.stop, kwargs.get("stop"), stop)
        if all_stops:
            params["ls_stop"] = list(all_stops)
        return params

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """False: LangChain's loader admits classes of its own packages only."""
        return False


def _check_own(own: Mapping[str, Any]) -> None:
    """Find bad values of `_COMMON_OWN`.

    Raises:
        RequestError: The message names the option and what it takes.
    """
    check_overflow_policy(own["on_overflow"])
    interval = own["stream_interval"]
    is_count = isinstance(interval, int) and not isinstance(interval, bool) and interval >= 1
    if interval != "auto" and not is_count:
        msg = f"stream_interval={interval!r} must be 'auto' or a number of tokens, at least 1."
        raise RequestError(msg)
