"""`Tokenizer`: text to token ids and back, the same ids as the model was trained with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from engine.errors import RequestError
from engine.text.added_tokens import AddedTokenInfo
from engine.text.gguf_tokenizer import parts_from_gguf_metadata
from engine.text.reference_encoder import ReferenceEncoder
from engine.text.text_template import TextTemplate
from engine.text.tiktoken_encoder import NotProvenError, TiktokenEncoder
from engine.text.token_pieces import TokenPieces, build_token_pieces
from engine.text.tokenizer_files import parts_from_folder
from engine.text.tokenizer_parts import TokenizerParts


class Tokenizer:
    """Encodes and detokenizes for one model. Immutable; any thread may use it.

    Encoding goes through tiktoken where that is proven to give the ids of the `tokenizers`
    pipeline, and through the pipeline everywhere else (`backend` says which).

    Attributes:
        backend: "tiktoken" or "tokenizers".
        fast_path_refusal: Why tiktoken is not used; None if it is.
        vocab_size: Number of token ids, the highest id plus one. A model's head may be wider.
        bos_token_id: Beginning of sequence, if the tokenizer names one (it may still not add it).
        eos_token_id: End of sequence, if the tokenizer names one.
        eos_token_ids: Every id that ends an answer according to the tokenizer's files.
        added_tokens: Tokens that are matched as a whole before any BPE, in id order.
        special_tokens: Control token -> id.
        special_token_ids: Ids of the control tokens; `skip_special_tokens` leaves them out.
        special_token_map: Role -> control token as chat templates use it, such as
            `{"bos_token": "<s>"}`.
        chat_template: Jinja source of the model's usual chat template, if it has one.
        chat_templates: Name -> source of all of them; the usual one is "default".
    """

    def __init__(self, parts: TokenizerParts) -> None:
        reference = ReferenceEncoder(parts.backend)
        self._reference = reference
        self._prefix_ids = reference.prefix_ids
        self._suffix_ids = reference.suffix_ids
        self.added_tokens: tuple[AddedTokenInfo, ...] = reference.added_tokens
        self.special_tokens: dict[str, int] = {
            token.content: token.token_id for token in self.added_tokens if token.special
        }
        self.special_token_ids: frozenset[int] = frozenset(self.special_tokens.values())
        self._tokens = _tokens_by_id(reference)
        self.vocab_size: int = len(self._tokens)
        self.pieces: TokenPieces | None = build_token_pieces(
            parts.backend, self._tokens, self.special_token_ids
        )
        self.special_token_map: Mapping[str, str] = dict(parts.special_token_map)
        self.chat_templates: Mapping[str, str] = dict(parts.chat_templates)
        self.chat_template: str | None = self.chat_templates.get("default")
        self.bos_token_id: int | None = self._named_id("bos_token")
        self.eos_token_id: int | None = self._named_id("eos_token")
        self.eos_token_ids: frozenset[int] = parts.eos_token_ids
        self._fast: TiktokenEncoder | None = None
        self.fast_path_refusal: str | None = None
        try:
            if parts.merges is None:
                raise NotProvenError("the model is not BPE")
            if self.pieces is None:
                raise NotProvenError("the decoder does not join bytes")
            self._fast = TiktokenEncoder(reference, parts.merges, self.pieces)
        except NotProvenError as refusal:
            self.fast_path_refusal = str(refusal)
        self.backend: Literal["tiktoken", "tokenizers"] = (
            "tokenizers" if self._fast is None else "tiktoken"
        )

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Load from a Hugging Face folder, or from a `tokenizer.json` itself.

        Read are tokenizer.json, tokenizer_config.json, special_tokens_map.json,
        chat_template.jinja and additional_chat_templates/*.jinja; all but the first are optional.

        Raises:
            ModelNotFoundError: There is no such folder or no tokenizer in it.
            UnsupportedModelError: The tokenizer has a format that must be converted first.
            CheckpointError: A file is broken, or two of them contradict each other.
        """
        return cls(parts_from_folder(path))

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build from the metadata of a GGUF file: plain Python values, keyed as in the file.

        Raises:
            UnsupportedModelError: The kind of vocabulary, or its way of splitting text, is unknown.
            CheckpointError: The metadata is incomplete or contradicts itself.
        """
        return cls(parts_from_gguf_metadata(metadata))

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Token ids of `text`.

        Args:
            text: Any text; NUL is a character like others.
            add_special_tokens: Add what the model's own post-processor adds, such as BOS. What the
                text already begins or ends with (control tokens parsed) is not added twice.
            parse_special: Turn control tokens written in the text into their ids. By default they
                are text, so that text from outside cannot forge structure.

        Raises:
            RequestError: `text` holds a lone surrogate, which no encoding of text can carry.
        """
        check_encodable(text)
        return self._surrounded(self._encode(text, parse_special), add_special_tokens)

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, parse_special: bool = False
    ) -> list[list[int]]:
        """`encode` of each text, together: faster than one by one, and on several threads.

        Raises:
            RequestError: A text holds a lone surrogate; the message says which.
        """
        for index, text in enumerate(texts):
            check_encodable(text, f"texts[{index}]")
        if self._fast is not None:
            fast = self._fast.encode_batch(texts, parse_special=parse_special)
            batch = [
                self._reference.encode(text, parse_special=parse_special) if ids is None else ids
                for text, ids in zip(texts, fast, strict=True)
            ]
        else:
            batch = self._reference.encode_batch(texts, parse_special=parse_special)
        return [self._surrounded(ids, add_special_tokens) for ids in batch]

    def encode_text_part(self, text: str, *, is_first: bool) -> list[int]:
        """Ids of a stretch of a longer text, control tokens as text, nothing added.

        Args:
            text: The stretch; both its ends are token boundaries, such as control tokens.
            is_first: Nothing comes before it. Some tokenizers mark the first word of a text.

        Raises:
            RequestError: `text` holds a lone surrogate.
        """
        check_encodable(text)
        if is_first or self._fast is not None:
            return self._encode(text, parse_special=False)
        return self._reference.encode_continuation(text)

    def template(self) -> TextTemplate:
        """What is put around one text and around a pair of texts."""
        return TextTemplate.of(self._reference.backend, self._prefix_ids, self._suffix_ids)

    def with_added_bos(self, token_ids: list[int]) -> list[int]:
        """`token_ids` after what the post-processor puts first (BOS), unless they begin with it."""
        prefix = self._prefix_ids
        return token_ids if token_ids[: len(prefix)] == prefix else prefix + token_ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; invalid UTF-8 becomes U+FFFD.

        Ids beyond the vocabulary (a head may be padded) stand for no text.

        Raises:
            RequestError: An id is negative.
        """
        _check_ids(token_ids)
        if self.pieces is None:
            known = [token_id for token_id in token_ids if token_id < self.vocab_size]
            text: str = self._reference.backend.decode(
                known, skip_special_tokens=skip_special_tokens
            )
            return text
        joined = self.pieces.join(token_ids, skip_special_tokens=skip_special_tokens)
        text = joined.decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.pieces.strips_leading_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for: possibly a part of a character, or with a leading space.

        Empty for ids beyond the vocabulary.

        Raises:
            RequestError: The id is negative.
        """
        _check_ids((token_id,))
        if token_id >= self.vocab_size:
            return b""
        if self.pieces is not None:
            return self.pieces[token_id]
        text: str = self._reference.backend.decode([token_id], skip_special_tokens=False)
        return text.encode()

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with U+FFFD for what is not a whole character."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        if self._fast is not None:
            ids = self._fast.encode(text, parse_special=parse_special)
            if ids is not None:
                return ids
        return self._reference.encode(text, parse_special=parse_special)

    def _surrounded(self, ids: list[int], add_special_tokens: bool) -> list[int]:
        if not add_special_tokens:
            return ids
        ids = self.with_added_bos(ids)
        suffix = self._suffix_ids
        return ids if not suffix or ids[-len(suffix) :] == suffix else ids + suffix

    def _named_id(self, name: str) -> int | None:
        token = self.special_token_map.get(name)
        if token is None:
            return None
        token_id: int | None = self._reference.backend.token_to_id(token)
        return token_id


def check_encodable(text: str, name: str = "The text") -> None:
    """Refuse what cannot be UTF-8.

    Args:
        text: To be checked.
        name: What the error message calls it.

    Raises:
        RequestError: `text` is no string, or holds a lone surrogate.
    """
    if not isinstance(text, str):
        msg = f"{name} is {type(text).__name__}, not str."
        raise RequestError(msg)
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        msg = (
            f"{name} holds the lone surrogate U+{ord(text[error.start]):04X} at position "
            f"{error.start}, which is not a character. Decode the source with errors='replace'."
        )
        raise RequestError(msg) from None


def _check_ids(token_ids: Sequence[int]) -> None:
    if len(token_ids) and min(token_ids) < 0:
        msg = f"Token id {min(token_ids)} is negative."
        raise RequestError(msg)


def _tokens_by_id(reference: ReferenceEncoder) -> list[str | None]:
    highest = max((token.token_id for token in reference.added_tokens), default=-1)
    highest = max(highest, *reference.vocab.values())
    tokens: list[str | None] = [None] * (highest + 1)
    for token, token_id in reference.vocab.items():
        tokens[token_id] = token
    for added in reference.added_tokens:
        tokens[added.token_id] = added.content
    return tokens
