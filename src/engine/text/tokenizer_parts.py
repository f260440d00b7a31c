"""What every source of a tokenizer (a folder, a GGUF file) comes down to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import tokenizers


@dataclasses.dataclass(frozen=True)
class TokenizerParts:
    """A tokenizer as read, before it is made fast.

    Attributes:
        backend: The `tokenizers` pipeline; its post-processor adds BOS, EOS and the like.
        merges: BPE merges in order; None where the model is not BPE.
        special_token_map: Role to text as chat templates use it: `{"bos_token": "<s>", …}`.
        chat_templates: Name to Jinja source. The usual one is named "default".
        eos_token_ids: Every id that ends an answer according to the tokenizer's own files.
    """

    backend: tokenizers.Tokenizer
    merges: Sequence[tuple[str, str]] | None
    special_token_map: Mapping[str, str]
    chat_templates: Mapping[str, str]
    eos_token_ids: frozenset[int]
