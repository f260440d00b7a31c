"""Our decoder against transformers, float32, on tiny random models of every family."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from model_driver import PagedDriver
from model_zoo import FAMILIES, decoder_like, hf_model

from engine.models.decoder import Decoder

TOLERANCE = 1e-4  # largest difference of any logit; logits are of order 4
BLOCK_SIZE = 16
NUM_LAYERS = 3


@functools.cache
def models(family: str) -> tuple[Any, Decoder]:
    model = hf_model(family)
    return model, decoder_like(model)


def random_ids(num_tokens: int, seed: int) -> list[int]:
    return [random.Random(seed).randrange(211) for _ in range(1)] + random.Random(seed + 1).choices(
        range(211), k=num_tokens - 1
    )


def hf_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    """[T, V] of one sequence on its own."""
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0]


def driver_for(decoder: Decoder, seed: int = 0, num_blocks: int = 40) -> PagedDriver:
    return PagedDriver(
        decoder, num_blocks=num_blocks, block_size=BLOCK_SIZE, num_layers=NUM_LAYERS, seed=seed
    )


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert not ours.isnan().any()
    assert (ours - theirs).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 70])
def test_whole_prompt_in_one_step(family: str, num_tokens: int) -> None:
    model, decoder = models(family)
    token_ids = random_ids(num_tokens, seed=num_tokens)
    driver = driver_for(decoder, seed=num_tokens)
    [logits] = driver.step([(driver.add(token_ids), None)])
    assert_close(logits, hf_logits(model, token_ids))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_prompt_in_chunks(family: str, chunk: int) -> None:
    model, decoder = models(family)
    token_ids = random_ids(70, seed=5)
    driver = driver_for(decoder)
    seq = driver.add(token_ids)
    pieces = []
    while seq.num_computed_tokens < len(token_ids):
        left = len(token_ids) - seq.num_computed_tokens
        pieces += driver.step([(seq, min(chunk, left))])
    assert_close(torch.cat(pieces), hf_logits(model, token_ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuation_is_the_same(family: str) -> None:
    model, decoder = models(family)
    prompt = random_ids(21, seed=7)
    expected = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=32,
        min_new_tokens=32,
        do_sample=False,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    # `min_new_tokens` bans the end-of-sequence id in transformers; skip that ban's effect.
    banned = model.generation_config.eos_token_id
    seq_driver = driver_for(decoder)
    seq = seq_driver.add(prompt)
    for _ in range(32):
        row = seq_driver.step([(seq, None)])[0][-1].clone()
        if banned is not None:
            row[banned] = -torch.inf
        seq.token_ids.append(int(row.argmax()))
    assert seq.token_ids[len(prompt) :] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batch_of_decodes_chunks_and_a_cached_prefix(family: str) -> None:
    model, decoder = models(family)
    driver = driver_for(decoder, seed=3, num_blocks=60)
    texts = [random_ids(length, seed=length) for length in (40, 33, 58, 5)]
    first, second, chunked, short = (driver.add(text) for text in texts)
    driver.step([(first, 39), (second, 32), (short, 3)])

    # `cached` shares 32 tokens of KV with `first`, then goes its own way.
    cached_ids = texts[0][:35] + random_ids(9, seed=1)
    cached = driver.add(cached_ids, prefix_of=first)
    assert cached.num_computed_tokens == 32
    results = driver.step(
        [(first, 1), (chunked, 20), (cached, None), (second, 1), (short, 2)], num_padding_tokens=0
    )
    for result, token_ids, span in zip(
        results,
        (texts[0], texts[2], cached_ids, texts[1], texts[3]),
        (slice(39, 40), slice(0, 20), slice(32, 44), slice(32, 33), slice(3, 5)),
        strict=True,
    ):
        assert_close(result, hf_logits(model, token_ids)[span])
    [rest] = driver.step([(chunked, None)])
    assert_close(rest, hf_logits(model, texts[2])[20:])


def test_padding_rows_change_nothing() -> None:
    _, decoder = models("llama")
    texts = [random_ids(30, seed=1), random_ids(18, seed=2)]
    results = []
    for num_padding_tokens in (0, 3):
        driver = driver_for(decoder)
        seqs = [driver.add(text) for text in texts]
        driver.step([(seq, len(seq.token_ids) - 1) for seq in seqs])
        results.append(
            driver.step([(seq, 1) for seq in seqs], num_padding_tokens=num_padding_tokens)
        )
    for plain, padded in zip(*results, strict=True):
        assert torch.equal(plain, padded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "family",
    [
        "llama-biases",
        "qwen3-window",
        "qwen2-moe",
        "qwen3-moe",
        "gpt-oss",
        "deepseek-v3",
        "gpt2",
        "llama4",
    ],
)
def test_a_sequence_does_not_notice_its_neighbours(family: str, dtype: torch.dtype) -> None:
    """Bit by bit: alone, beside one, beside many; at decode and within a prefill."""
    decoder = decoder_like(models(family)[0], dtype=dtype)
    token_ids = random_ids(37, seed=4)
    outcomes = []
    for num_neighbours in (0, 1, 2, 6, 11, 20):
        driver = driver_for(decoder, seed=num_neighbours, num_blocks=120)
        seq = driver.add(token_ids)
        others = [driver.add(random_ids(20 + i, seed=100 + i)) for i in range(num_neighbours)]
        prefill = driver.step([(seq, 36), *((other, len(other.token_ids) - 1) for other in others)])
        decode = driver.step([(seq, 1), *((other, 1) for other in others)])
        outcomes.append(torch.cat((prefill[0], decode[0])))
    for outcome in outcomes[1:]:
        assert torch.equal(outcome, outcomes[0])


def test_bfloat16_stays_close_to_float32() -> None:
    model, _ = models("qwen2")
    decoder = decoder_like(model, dtype=torch.bfloat16)
    token_ids = random_ids(40, seed=9)
    driver = driver_for(decoder)
    [logits] = driver.step([(driver.add(token_ids), None)])
    assert logits.dtype == torch.bfloat16
    reference = hf_logits(model, token_ids)
    theirs = hf_logits(hf_model("qwen2").bfloat16(), token_ids).float()
    # No worse than twice the rounding error that transformers itself makes in bfloat16.
    error = (logits.float() - reference).abs().mean()
    assert error < 2 * (theirs - reference).abs().mean()
