"""Constraints of every kind, the options they meet, and what an answer must look like."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "kind": {"enum": ["small", "large"]},
        "sizes": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}
PHONE = r"[0-9]{3}-[0-9]{4}"
CONSTRAINTS: list[dict[str, Any]] = [
    {"json_schema": SCHEMA},
    {"regex": PHONE},
    {"choice": ["red", "green", "blue"]},
    {"grammar": 'start: "<" /[a-z]+/ ">" %json {"type": "boolean"}'},
    {"grammar": 'root ::= "yes" | "no" "!"*'},
]


def check(text: str, options: dict[str, Any]) -> None:
    if "json_schema" in options:
        jsonschema.validate(json.loads(text), SCHEMA)
    elif "regex" in options:
        assert re.fullmatch(PHONE, text), text
    elif "choice" in options:
        assert text in options["choice"]
    elif options["grammar"].startswith("start"):
        assert re.fullmatch("<[a-z]+>(true|false)", text), text
    else:
        assert re.fullmatch("yes|no!*", text), text


VARIATIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "random": {"temperature": 1.0, "seed": 5},
    "filtered": {"temperature": 1.5, "seed": 5, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
    "penalties": {"seed": 5, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    "bias": {"seed": 5, "logit_bias": {40: 5.0}},
    "n answers": {"n": 3, "seed": 5},
    "log probabilities": {"seed": 5, "logprobs": 2},
    "ignore_eos": {"seed": 5, "ignore_eos": True},
    "min_tokens": {"seed": 5, "min_tokens": 4},
}
