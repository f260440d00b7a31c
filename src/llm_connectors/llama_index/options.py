"""What one request asks for: the model's fields with the call's keywords on top."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine import SamplingParams
from llm_connectors._answer_plan import AnswerOptions
from llm_connectors._params import (
    ALIASES,
    SAMPLING_NAMES,
    check_names,
    make_sampling_params,
    resolve_aliases,
)
from llm_connectors._tool_request import tool_request
from llm_connectors.llama_index.errors import RequestError
from llm_connectors.llama_index.tools import openai_tools

REQUEST_NAMES = (
    "timeout",
    "priority",
    "cache_salt",
    "chat_template",
    "chat_template_kwargs",
    "thinking",
    "tool_parser",
    "reasoning_parser",
)
"""Fields beside the sampling options that a call may override."""

TOOL_NAMES = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "strict")
"""Keywords of a chat that are no fields, in the OpenAI API's words."""

_CALL_NAMES = (*SAMPLING_NAMES, *REQUEST_NAMES, *TOOL_NAMES, *ALIASES)


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """Everything about a request but its prompt.

    Attributes:
        params: How tokens are chosen and when the answer ends.
        timeout: Seconds from submit until the request is aborted; None waits.
        priority: Smaller runs sooner.
        cache_salt: Requests with different salts share no prefix-cache blocks.
        answer: How the prompt is made and the answer read: template, tools, format, reasoning.
    """

    params: SamplingParams
    timeout: float | None
    priority: int
    cache_salt: str | None
    answer: AnswerOptions

    @property
    def chat_template(self) -> str | None:
        """Jinja source instead of the model's own."""
        return self.answer.chat_template


def request_options(fields: Mapping[str, Any], call: Mapping[str, Any]) -> RequestOptions:
    """Options of one request. A keyword of the call replaces the field of that name.

    Args:
        fields: Sampling and request fields of the model object.
        call: Keywords of the call, by name or alias.

    Raises:
        RequestError: A name is unknown or a value is bad; here or as the engine's twin class.
    """
    check_names(call.keys(), _CALL_NAMES, "LocalLLM call option")
    asked = {name: call[name] for name in TOOL_NAMES if name in call}
    values = {**fields, **resolve_aliases({k: v for k, v in call.items() if k not in asked})}
    if "logprobs" in call and "top_logprobs" not in call:
        # The pair is one option: a call that gives the first replaces both.
        values["top_logprobs"] = None
    own = {name: values.pop(name) for name in REQUEST_NAMES}
    timeout = own["timeout"]
    if timeout is not None and (not isinstance(timeout, int | float) or not timeout > 0):
        msg = f"timeout={timeout!r} must be None or a positive number of seconds."
        raise RequestError(msg)
    params = make_sampling_params(values)
    if params.n != 1:
        msg = (
            f"n={params.n}: a LlamaIndex response holds one answer. Use batch_complete([prompt] "
            f"* {params.n}), whose requests share the prompt's KV blocks."
        )
        raise RequestError(msg)
    if params.prompt_logprobs is not None:
        msg = (
            f"prompt_logprobs={params.prompt_logprobs}: a LlamaIndex response has no place for "
            "them. Use llm.engine.submit with SamplingParams(prompt_logprobs=...)."
        )
        raise RequestError(msg)
    return RequestOptions(
        params=params,
        timeout=timeout,
        priority=own["priority"],
        cache_salt=own["cache_salt"],
        answer=_answer_options(own, asked),
    )


def _answer_options(own: Mapping[str, Any], asked: dict[str, Any]) -> AnswerOptions:
    thinking = own["thinking"]
    if thinking is not None and not isinstance(thinking, bool | str):
        msg = f"thinking={thinking!r} must be True, False, None or an effort such as 'low'."
        raise RequestError(msg)
    if "tools" in asked:
        asked["tools"] = openai_tools(asked["tools"])
    return AnswerOptions(
        chat_template=own["chat_template"],
        template_kwargs=own["chat_template_kwargs"],
        tool_parser=own["tool_parser"],
        reasoning_parser=own["reasoning_parser"],
        reasoning=thinking,
        request=tool_request(asked.pop("tools", None), **asked) if asked else None,
    )
