"""Figures to compare with: other engines on the same machine and workloads, and our goals."""

from __future__ import annotations

from typing import NamedTuple


class Reference(NamedTuple):
    """Wall seconds of one workload on one H100: vLLM 0.26, SGLang 0.5.17, and what we aim at."""

    vllm: float
    sglang: float
    goal: float

    @property
    def best(self) -> float:
        """The better of the two engines."""
        return min(self.vllm, self.sglang)


WORKLOADS_H100: dict[tuple[str, str], Reference] = {
    ("llama-135m", "single"): Reference(0.637, 0.462, 0.13),
    ("llama-135m", "mixed"): Reference(6.82, 3.63, 1.8),
    ("llama-135m", "chat"): Reference(13.0, 6.80, 2.2),
    ("llama-135m", "rag"): Reference(0.610, 0.335, 0.20),
    ("llama-135m", "longprompt"): Reference(0.336, 0.310, 0.28),
    ("qwen3-0.6b", "single"): Reference(0.538, 0.418, 0.19),
    ("qwen3-0.6b", "mixed"): Reference(7.50, 7.63, 6.4),
    ("qwen3-0.6b", "chat"): Reference(11.1, 8.11, 5.0),
    ("qwen3-0.6b", "rag"): Reference(0.787, 0.677, 0.40),
    ("qwen3-0.6b", "longprompt"): Reference(0.789, 0.779, 0.74),
    ("llama-8b", "single"): Reference(1.672, 1.633, 1.45),
    ("llama-8b", "mixed"): Reference(16.8, 17.0, 15.3),
    ("llama-8b", "chat"): Reference(20.3, 18.6, 16.5),
    ("llama-8b", "rag"): Reference(1.277, 1.573, 0.75),
    ("llama-8b", "longprompt"): Reference(3.93, 3.99, 3.85),
}

START_S = Reference(60.0, 57.0, 15.0)
"""Constructor to first token, weights in place; vLLM takes 60 to 90 s."""

BUSY_LOSS_GOALS: dict[tuple[str, int], float] = {
    ("default", 1): 0.25,
    ("default", 4): 0.50,
    ("process", 1): 0.10,
    ("process", 4): 0.15,
}
"""(placement, spinning threads) -> share of `chat`'s throughput that may be lost."""

SPINNER_KEEPS_GOAL = 0.60
"""Share of its own speed that one spinning thread keeps."""

FRAMEWORK_GOALS: dict[str, float] = {
    "ChatLocal.batch": 0.15,
    "ChatLocal.abatch": 0.25,
    "ChatLocal.ainvoke x256": 0.25,
    "LocalLLM.achat x256": 0.25,
    "ChatLocal.astream x256": 0.15,
    "handle streams x256": 0.15,
}
"""Case -> share by which it may be slower than `Engine.generate` on the same texts."""

CONSTRAINED_GOAL = 0.10
"""Share by which 64 JSON answers may be slower than the same tokens without a schema."""

CPU_GOALS: dict[str, tuple[str, float]] = {
    "decode_tok_s": ("≥", 120.0),
    "ttft_1024_s": ("≤", 1.1),
    "w16_tok_s": ("≥", 170.0),
    "w64_tok_s": ("≥", 180.0),
    "load_s": ("≤", 1.5),
    "peak_rss_mib": ("≤", 600.0),
}
"""Figure on 2 cores of a Zen 4 EPYC with the demo model -> which side of what it should be on."""

CPU_BUSY_GOAL = 0.5
"""Share of its quiet speed that a CPU engine keeps beside one busy process."""

HOST_MS_PER_STEP_GOAL = 1.0
"""Of the engine thread at 256 running sequences."""
