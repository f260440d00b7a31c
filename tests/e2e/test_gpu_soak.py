"""Random load on a GPU for a while; also what runs under compute-sanitizer (`make sanitize`).

`SOAK_SECONDS` sets the time. Under the sanitizer every kernel is many times slower, so that there
the number of steps is small, but each kernel and each captured graph is met.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from soak_load import check_all_came_back, run_load

from engine import Engine, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SOAK_S = float(os.environ.get("SOAK_SECONDS", "20"))
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
PROMPT = list(range(20, 90))


@pytest.mark.timeout(SOAK_S + 600)
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_soak_on_a_gpu(tiny_llama: Path, kv_cache_dtype: str) -> None:
    sizes = {"num_kv_blocks": 40, "block_size": 16, "max_num_seqs": 12}
    with Engine(
        str(tiny_llama),
        device="cuda",
        dtype="bfloat16",
        kv_cache_dtype=kv_cache_dtype,
        **sizes,
    ) as engine:
        before = engine.generate(PROMPT, GREEDY).outputs[0].token_ids
        reserved_bytes = torch.cuda.memory_reserved()
        load = run_load(engine, SOAK_S)
        check_all_came_back(engine, load)
        print(f"\nendings {dict(load.endings)}\n{engine.stats()}")
        # Graphs of sampler variants and sizes met meanwhile, and nothing that grows with requests.
        assert torch.cuda.memory_reserved() - reserved_bytes < 256 << 20
        assert engine.generate(PROMPT, GREEDY).outputs[0].token_ids == before
