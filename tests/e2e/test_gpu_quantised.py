"""Engines on a GPU over weights in codes: tokens, graphs, neighbours, memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from loader_files import llama_config, random_model
from tiny_checkpoints import VOCAB_SIZE, write_byte_tokenizer

from engine import Engine, SamplingParams
from engine.layers.rounding import round_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPTIONS = {"device": "cuda", "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 8}
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in float32 whose products have several tiles."""
    path = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 256, "intermediate_size": 384, "vocab_size": VOCAB_SIZE}
    model = random_model(llama_config(**sizes, tie_word_embeddings=False))
    model.float().save_pretrained(path)
    write_byte_tokenizer(path)
    return path


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 64, (n,), generator=generator).tolist() for n in (3, 17, 70, 130)]


def answers(folder: Path, **options: object) -> list[list[int]]:
    with Engine(str(folder), **OPTIONS, **options) as engine:
        outputs = engine.generate(prompts(), GREEDY)
        return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_greedy_tokens_are_transformers_with_the_rounded_weights(folder: Path, name: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in key:
                kind = "int8" if "lm_head" in key else name
                weight.copy_(round_weight(weight, kind).expand())
    found = answers(folder, quantization=name, dtype="float32")
    for prompt, tokens in zip(prompts(), found, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(16):
                ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
        assert ids[0, len(prompt) :].tolist() == tokens


@pytest.mark.parametrize("name", ["int4", "int8", "fp8"])
def test_a_batch_invariant_engine_does_not_notice_neighbours(folder: Path, name: str) -> None:
    options = {**OPTIONS, "quantization": name, "dtype": "bfloat16", "batch_invariant": True}
    with Engine(str(folder), **options) as engine:
        together = engine.generate(prompts(), GREEDY)
        engine.reset_prefix_cache()
        for prompt, output in zip(prompts(), together, strict=True):
            alone = engine.generate([prompt], GREEDY)[0]
            assert alone.outputs[0].token_ids == output.outputs[0].token_ids


def test_captured_steps_are_the_eager_ones(folder: Path) -> None:
    options = {"quantization": "int4", "dtype": "bfloat16"}
    assert answers(folder, **options) == answers(folder, enforce_eager=True, **options)


def test_plain_weights_are_not_in_memory_beside_the_codes(folder: Path) -> None:
    with Engine(str(folder), quantization="int4", dtype="bfloat16", **OPTIONS) as engine:
        rounded = engine.stats().weight_bytes
    with Engine(str(folder), dtype="bfloat16", **OPTIONS) as engine:
        assert rounded < 0.6 * engine.stats().weight_bytes
