"""Llama 3.1 to 3.3: a bare JSON object with "parameters", several parted by semicolons.

Source: Meta's prompt format pages for Llama 3.1 and 3.2 and the chat template of
meta-llama/Llama-3.1-8B-Instruct. `<|python_tag|>` may stand before a call.
"""

from __future__ import annotations

from engine.text.call_syntax import CallSyntax
from engine.text.tool_parsers.bare_json import BareJsonParser


class Llama3JsonParser(BareJsonParser):
    """`{"name": "f", "parameters": {…}}`, anywhere in the answer."""

    name = "llama3_json"
    syntax = CallSyntax(
        '{"name": "', '", "parameters": ', "}", between="; ", arguments_key="parameters"
    )
    markers = ("<|python_tag|>",)
    prefixes = ("<|python_tag|>",)
    argument_keys = ("parameters", "arguments")
