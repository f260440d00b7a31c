"""Every family on a GPU, float32, against transformers on the CPU."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from model_driver import PagedDriver
from model_zoo import FAMILIES, DictCheckpoint, described, hf_model, stored_weights
from other_models import other_model
from tiny_checkpoints import VOCAB_SIZE, write_byte_tokenizer

from engine import Engine, SamplingParams
from engine.errors import UnsupportedModelError
from engine.models.decoder import Decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WITHOUT_KERNELS = ("gpt-oss", "llama4")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in WITHOUT_KERNELS])
def test_prompt_and_decode(family: str) -> None:
    model = hf_model(family)
    decoder = Decoder(described(family), torch.device("cuda"), torch.float32)
    decoder.load(DictCheckpoint(stored_weights(model)))
    driver = PagedDriver(decoder, num_blocks=12, block_size=64, num_layers=3)
    token_ids = random.Random(5).choices(range(211), k=100)
    seq, other = driver.add(token_ids), driver.add(token_ids[50:90])
    pieces = driver.step([(seq, 70), (other, 39)])[:1]
    pieces += driver.step([(seq, 29), (other, 1)])[:1]
    pieces += driver.step([(seq, 1)])
    with torch.no_grad():
        want = model(torch.tensor([token_ids])).logits[0]
    torch.testing.assert_close(torch.cat(pieces).cpu(), want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", WITHOUT_KERNELS)
def test_what_has_no_kernel_is_refused(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match="no attention kernel on a GPU"):
        Decoder(described(family), torch.device("cuda"), torch.float32)


@pytest.mark.parametrize("name", ["arcee", "glm4-moe"])
def test_engines_on_transformers_code(tmp_path: Path, name: str) -> None:
    model = other_model(name, vocab_size=VOCAB_SIZE)
    model.save_pretrained(tmp_path, save_original_format=False)
    prompts = [random.Random(n).choices(range(211), k=n) for n in (5, 40)]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    write_byte_tokenizer(tmp_path)
    options = {"device": "cuda", "dtype": "float32", "max_num_seqs": 4, "num_kv_blocks": 40}
    with Engine(str(tmp_path), **options) as eng:
        outs = eng.generate(prompts, params)
    for prompt, out in zip(prompts, outs, strict=True):
        want = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert list(out.outputs[0].token_ids) == want[0, len(prompt) :].tolist()
