"""Reading tool calls out of answers, one file per family of formats. Knows no framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import ConfigError, nearest_name_hint
from engine.text.tool_parsers.bare_json import BareJsonParser
from engine.text.tool_parsers.base import ToolParser
from engine.text.tool_parsers.deepseek import DeepSeekParser
from engine.text.tool_parsers.gemma import GemmaParser
from engine.text.tool_parsers.granite import GraniteParser
from engine.text.tool_parsers.harmony import HarmonyParser
from engine.text.tool_parsers.hermes import HermesParser
from engine.text.tool_parsers.llama3 import Llama3JsonParser
from engine.text.tool_parsers.mistral import MistralParser
from engine.text.tool_parsers.phi4 import Phi4Parser
from engine.text.tool_parsers.pythonic import PythonicParser
from engine.text.tool_parsers.qwen_xml import QwenXmlParser

TOOL_PARSERS: Mapping[str, type[ToolParser]] = {
    parser.name: parser
    for parser in (
        HermesParser,
        Llama3JsonParser,
        PythonicParser,
        MistralParser,
        GraniteParser,
        Phi4Parser,
        GemmaParser,
        HarmonyParser,
        DeepSeekParser,
        QwenXmlParser,
        BareJsonParser,
    )
}
"""Every parser by the name that `tool_parser=` takes."""

# The first whose marks all stand in the template; families with special marks before others.
_MARKS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|channel|>", "<|message|>"), "harmony"),
    (("<function=",), "qwen_xml"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<｜tool▁call▁begin｜>",), "deepseek"),
    (("<start_function_call>",), "gemma"),
    (("<|tool_call>",), "gemma"),
    (("<|tool_call|>", "<|tool|>"), "phi4"),
    (("functools",), "phi4"),
    (("<|tool_call|>",), "granite"),
    (("<tool_call>",), "hermes"),
    (("<|python_start|>",), "pythonic"),
    (("<function_calls>",), "pythonic"),
    (("[func_name1(",), "pythonic"),
    (("<|python_tag|>",), "llama3_json"),
    (("Environment: ipython",), "llama3_json"),
)
_MODEL_TYPES = {
    "gpt_oss": "harmony",
    "llama4": "pythonic",
    "mistral": "mistral",
    "mistral3": "mistral",
    "deepseek_v3": "deepseek",
}


def choose_tool_parser(template: str | None, model_type: str | None) -> str:
    """Name of the parser for a model.

    Args:
        template: Source of its chat template. What marks it has decides.
        model_type: As in config.json; asked where the template shows tools without a known mark.

    Returns:
        A key of `TOOL_PARSERS`; "hermes" where nothing is known, whose tags are then described in
        the prompt.
    """
    for marks, name in _MARKS:
        if template and all(mark in template for mark in marks):
            return name
    if template and "tools" in template:
        return _MODEL_TYPES.get(model_type or "", "json")
    return "hermes"


def make_tool_parser(name: str, tools: Mapping[str, Mapping[str, Any]] | None) -> ToolParser:
    """A fresh parser for one answer.

    Raises:
        ConfigError: The name is unknown.
    """
    parser = TOOL_PARSERS.get(name)
    if parser is None:
        hint = nearest_name_hint(name, TOOL_PARSERS)
        msg = f"tool_parser={name!r} is unknown; there are {', '.join(TOOL_PARSERS)}.{hint}"
        raise ConfigError(msg)
    return parser(tools)
