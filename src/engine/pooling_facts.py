"""`PoolingFacts`: what the face of an engine must know of a model that embeds or scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingFacts:
    """Plain values: they cross a process boundary.

    Attributes:
        kind: "embed": vectors; "score": one number a pair of texts.
        width: Entries of a vector, 1 for scores.
        max_tokens: Longest text or pair, special tokens included.
        normalizes: Whether the model's own vectors have length 1.
        lower_case: Whether texts are lower-cased first.
        prompts: Name -> what is put before a text.
        default_prompt_name: Chosen where the caller chooses none.
        activation: What scores go through: "sigmoid" or "".
    """

    kind: Literal["embed", "score"]
    width: int
    max_tokens: int
    normalizes: bool = False
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    activation: str = ""
