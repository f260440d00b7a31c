"""A tokenizer from the metadata of a GGUF file.

A GGUF file carries a vocabulary, not a tokenizer: how text is cut and normalised follows from two
names in it. Source: the GGUF specification, and what ggml-org/llama.cpp does with it
(`src/llama-vocab.cpp` at commit 00ad355e, MIT).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import CheckpointError, UnsupportedModelError
from engine.text.split_patterns import GGUF_PRE_TOKENIZERS, GPT2_SPLIT, GgufPreTokenizer
from engine.text.tokenizer_parts import TokenizerParts

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPECIAL_TOKEN_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "sep_token": "seperator_token_id",  # Spelled so in the GGUF specification.
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}


def parts_from_gguf_metadata(metadata: Mapping[str, Any]) -> TokenizerParts:
    """The tokenizer that `metadata`, keyed as in the file, describes.

    Raises:
        CheckpointError: The metadata is incomplete or contradicts itself.
        UnsupportedModelError: The kind of tokenizer or the way it splits text is not known.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _checked_tokens(metadata)
    types = _checked_types(metadata, len(tokens))
    if kind == "gpt2":
        backend, merges, add_bos = _byte_level_bpe(metadata, tokens)
    elif kind == "llama":
        backend, merges, add_bos = _sentencepiece_bpe(metadata, tokens, types)
    else:
        msg = (
            f"tokenizer.ggml.model={kind!r} in the GGUF file is not supported, only 'gpt2' "
            "(byte-level BPE) and 'llama' (SentencePiece BPE). Give the model's Hugging Face "
            "folder as `tokenizer`."
        )
        raise UnsupportedModelError(msg)
    is_phi3 = kind == "llama" and metadata.get("general.architecture") == "phi3"
    _add_tokens(backend, tokens, types, swallow_space=is_phi3)
    ids = {name: _token_id(metadata, key, tokens) for name, key in _SPECIAL_TOKEN_KEYS.items()}
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    _set_post_processor(
        backend,
        tokens,
        ids["bos_token"] if add_bos else None,
        ids["eos_token"] if add_eos else None,
    )
    ends = (ids["eos_token"], *(_token_id(metadata, f"{n}_token_id", tokens) for n in _TURN_ENDS))
    return TokenizerParts(
        backend,
        merges,
        {name: tokens[token_id] for name, token_id in ids.items() if token_id is not None},
        _chat_templates(metadata),
        frozenset(token_id for token_id in ends if token_id is not None),
    )


_TURN_ENDS = ("eot", "eom")


def _checked_tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        msg = (
            "The GGUF file holds no tokenizer.ggml.tokens. Give a folder with a tokenizer.json as "
            "`tokenizer`."
        )
        raise CheckpointError(msg)
    tokens = list(tokens)
    if len(set(tokens)) != len(tokens):
        first_id: dict[str, int] = {}
        for token_id, token in enumerate(tokens):
            if first_id.setdefault(token, token_id) != token_id:
                msg = f"The GGUF file lists token {token!r} as id {first_id[token]} and {token_id}."
                raise CheckpointError(msg)
    return tokens


def _checked_types(metadata: Mapping[str, Any], num_tokens: int) -> Sequence[int]:
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return [_NORMAL] * num_tokens
    if len(types) != num_tokens:
        msg = f"The GGUF file has {num_tokens} tokens but {len(types)} entries in token_type."
        raise CheckpointError(msg)
    checked: Sequence[int] = types
    return checked


def _token_id(metadata: Mapping[str, Any], key: str, tokens: Sequence[str]) -> int | None:
    token_id = metadata.get(f"tokenizer.ggml.{key}")
    if token_id is None:
        return None
    if not 0 <= token_id < len(tokens):
        msg = f"tokenizer.ggml.{key}={token_id} in the GGUF file is outside 0..{len(tokens) - 1}."
        raise CheckpointError(msg)
    return int(token_id)


def _split_merges(merges: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if all(len(pair) == 2 for pair in pairs):
        return cast("list[tuple[str, str]]", pairs)
    return [_split_merge(merge) for merge in merges]


def _split_merge(merge: str) -> tuple[str, str]:
    # A token may hold a space, and then the pair's own separator is not the first character.
    middle = merge.find(" ", 1)
    if middle < 0:
        msg = f"The GGUF file's merge {merge!r} is not a pair of tokens."
        raise CheckpointError(msg)
    return merge[:middle], merge[middle + 1 :]


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab=vocab, merges=merges, **options)
    except Exception as error:  # The library raises bare Exception.
        msg = f"The GGUF file's merges do not fit its tokens: {error}"
        raise CheckpointError(msg) from error


def _byte_level_bpe(
    metadata: Mapping[str, Any], tokens: Sequence[str]
) -> tuple[tokenizers.Tokenizer, list[tuple[str, str]], bool]:
    """Pipeline, merges, and whether BOS is added if the file does not say."""
    name = metadata.get("tokenizer.ggml.pre")
    known = GGUF_PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if known is None:
        msg = (
            f"tokenizer.ggml.pre={name!r} in the GGUF file does not name a known way of splitting "
            f"text ({', '.join(sorted(GGUF_PRE_TOKENIZERS))}); a guess would silently give wrong "
            "token ids. Give the model's Hugging Face folder as `tokenizer`."
        )
        raise UnsupportedModelError(msg)
    if "tokenizer.ggml.merges" not in metadata:
        raise CheckpointError("The GGUF file's tokenizer is byte-level BPE but holds no merges.")
    merges = _split_merges(metadata["tokenizer.ggml.merges"])
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(_bpe(vocab, merges, ignore_merges=known.ignore_merges))
    if known.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(known)
    backend.decoder = decoders.ByteLevel()
    return backend, merges, known.add_bos


def _pre_tokenizer(known: GgufPreTokenizer) -> pre_tokenizers.PreTokenizer:
    # ByteLevel brings GPT-2's split along.
    ends_with_gpt2 = known.splits[-1] == GPT2_SPLIT
    splits = known.splits[:-1] if ends_with_gpt2 else known.splits
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Digits(individual_digits=True)
        if pattern is None
        else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        for pattern in splits
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=ends_with_gpt2)
    return pre_tokenizers.Sequence([*steps, byte_level])


def _sentencepiece_bpe(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> tuple[tokenizers.Tokenizer, list[tuple[str, str]], bool]:
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if "tokenizer.ggml.merges" in metadata:
        merges = _split_merges(metadata["tokenizer.ggml.merges"])
    else:
        merges = _merges_from_scores(metadata, tokens, types)
    unknown_id = _token_id(metadata, "unknown_token_id", tokens)
    unknown = None if unknown_id is None else tokens[unknown_id]
    model = _bpe(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    mark_spaces = normalizers.Replace(" ", "\u2581")
    decode_steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), mark_spaces])
        decode_steps.append(decoders.Strip(content=" ", left=1, right=0))
    else:
        backend.normalizer = mark_spaces
    backend.decoder = decoders.Sequence(decode_steps)
    return backend, merges, True


def _merges_from_scores(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> list[tuple[str, str]]:
    """The merge list equal to SentencePiece's rule: join the pair whose result scores highest.

    Every way to cut a token in two tokens is a merge; better tokens come first.
    """
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        found = "no" if scores is None else f"{len(scores)}"
        msg = f"The GGUF file has {len(tokens)} SentencePiece tokens but {found} scores."
        raise CheckpointError(msg)
    mergeable = [token_id for token_id, kind in enumerate(types) if kind == _NORMAL]
    parts = {tokens[token_id] for token_id in mergeable}
    if len(mergeable) > 1 and len({scores[token_id] for token_id in mergeable}) == 1:
        msg = (
            "All tokens of the GGUF file have the same score, so the order of merges is lost. "
            "Give the model's Hugging Face folder as `tokenizer`."
        )
        raise UnsupportedModelError(msg)
    merges = []
    for token_id in sorted(mergeable, key=lambda token_id: -scores[token_id]):
        token = tokens[token_id]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in parts and right in parts:
                merges.append((left, right))
    return merges


# Phi-3's own tokenizer drops white space after every added token but these.
_PHI3_KEEPS_SPACE_AFTER = frozenset(("<unk>", "<s>", "<|endoftext|>"))


def _add_tokens(
    backend: tokenizers.Tokenizer,
    tokens: Sequence[str],
    types: Sequence[int],
    *,
    swallow_space: bool,
) -> None:
    """Control tokens become special; user-defined ones always match, but are plain text."""
    special: list[AddedToken] = []
    plain: list[AddedToken] = []
    for token, kind in zip(tokens, types, strict=True):
        if kind not in (_CONTROL, _UNKNOWN, _USER_DEFINED):
            continue
        is_special = kind != _USER_DEFINED
        rstrip = swallow_space and token not in _PHI3_KEEPS_SPACE_AFTER
        added = AddedToken(token, special=is_special, normalized=False, rstrip=rstrip)
        (special if is_special else plain).append(added)
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _set_post_processor(
    backend: tokenizers.Tokenizer, tokens: Sequence[str], bos_id: int | None, eos_id: int | None
) -> None:
    before = [] if bos_id is None else [tokens[bos_id]]
    after = [] if eos_id is None else [tokens[eos_id]]
    if before or after:
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=[
                (tokens[token_id], token_id)
                for token_id in (bos_id, eos_id)
                if token_id is not None
            ],
        )


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    prefix = "tokenizer.chat_template."
    templates = {
        key.removeprefix(prefix): source
        for key, source in metadata.items()
        if key.startswith(prefix)
    }
    if source := metadata.get("tokenizer.chat_template"):
        templates["default"] = source
    return templates
