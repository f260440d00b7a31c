"""Models that do not fit are refused with the numbers, before anything is made or read."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import transformers

from engine import CapacityError, Engine

# Config class and architecture -> sizes of the real thing, with bfloat16 weights in GB.
LARGE: dict[str, tuple[str, str, dict[str, Any], float]] = {
    "deepseek-v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {}, 1342),
    "llama4-maverick": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {"num_local_experts": 128, "interleave_moe_layer_step": 2},
        795,
    ),
    "mixtral-8x22b": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {
            "hidden_size": 6144,
            "intermediate_size": 16384,
            "num_hidden_layers": 56,
            "num_attention_heads": 48,
        },
        281,
    ),
    "in transformers' own code": (
        "ApertusConfig",
        "ApertusForCausalLM",
        {
            "hidden_size": 8192,
            "intermediate_size": 43008,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
        141,
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_too_large_a_model_is_refused_with_the_numbers(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_class, architecture, changes, gigabytes = LARGE[name]
    config = getattr(transformers, config_class)(**changes).to_dict()
    config |= {"architectures": [architecture], "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    # A machine that cannot hold any of them, wherever this runs.
    monkeypatch.setattr("engine.runner.memory.available_host_bytes", lambda: 100 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    with pytest.raises(CapacityError) as caught:
        Engine(str(tmp_path), load_format="dummy", device="cpu", dtype="bfloat16")
    assert time.perf_counter() - started < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
    message = str(caught.value)
    assert "this machine has 100.00 GiB free" in message
    needed = float(message.split("need ")[1].split(" GiB")[0]) * 2**30 / 1e9
    assert needed == pytest.approx(gigabytes, rel=0.03)
