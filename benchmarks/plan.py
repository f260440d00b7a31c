"""What a benchmark run measures with: device, shapes, sizes, engines, and where rows go."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rows import RowFile
from workloads import SHAPES, model_dir

if TYPE_CHECKING:
    from engine import Engine, SamplingParams

Requests = list[tuple[list[int], int]]

SHAPES["tiny"] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 49152,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
"""No model anybody has: proves the harness itself on a CPU within seconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One run's settings. Goes to child processes as JSON.

    Attributes:
        device: "cuda" or "cpu".
        shapes: Names in `workloads.SHAPES`.
        workloads: Names in `workloads.WORKLOADS`.
        placements: "default" (the engine's own choice) or a value of `EngineConfig.placement`.
        rates: Requests per second of the latency section.
        latency_s: Seconds of arrivals per rate.
        text_model: Folder with `tokenizer.json` for the sections that send text.
        kv_cache_mib: KV cache of each engine; None lets it fill its share of the GPU.
        is_quick: Few, short requests: for testing the harness, not for figures.
        rows_path: JSON-lines file that rows are appended to.
        resume: Skip figures that the file has from this commit and machine.
        environment: Put into each row.
    """

    device: str
    shapes: tuple[str, ...]
    workloads: tuple[str, ...]
    placements: tuple[str, ...] = ("default",)
    rates: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0, 32.0)
    latency_s: float = 20.0
    text_model: str | None = None
    kv_cache_mib: int | None = None
    is_quick: bool = False
    rows_path: str = ""
    resume: bool = False
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """For a child's command line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan a parent sent."""
        values = json.loads(text)
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

    def open_rows(self) -> RowFile:
        """The file rows go to."""
        environment = {**self.environment, "is_quick": self.is_quick}
        return RowFile(Path(self.rows_path), environment, resume=self.resume)

    def shape_for(self, preferred: str) -> str:
        """`preferred` where it is among the shapes, else the first one."""
        return preferred if preferred in self.shapes else self.shapes[0]

    def sized(self, requests: Requests) -> Requests:
        """The requests, or a few short ones of them in a quick run."""
        if not self.is_quick:
            return requests
        return [(prompt[:48], min(count, 12)) for prompt, count in requests[:8]]

    def make_engine(
        self, shape: str, placement: str = "default", folder: str | None = None, **options: Any
    ) -> Engine:
        """An engine with random weights of `shape`.

        Args:
            shape: Name in `SHAPES`.
            placement: As in `placements`.
            folder: A folder with the shape's `config.json` and a tokenizer, instead of one without.
            **options: Further engine options.
        """
        from engine import Engine

        options = {"max_num_seqs": 16 if self.is_quick else 512, **options}
        if shape == "tiny":
            # Threads that wait for each other cost more than so small a model takes.
            options["num_threads"] = 1
        if placement != "default":
            options["placement"] = placement
        if self.kv_cache_mib is not None:
            options["kv_cache_memory_bytes"] = self.kv_cache_mib << 20
        return Engine(
            folder or model_dir(shape),
            load_format="dummy",
            device=self.device,
            dtype="bfloat16",
            **options,
        )


@dataclasses.dataclass(frozen=True)
class Job:
    """What one child process measures.

    Attributes:
        section: Name in `run.SECTIONS`.
        name: For messages; unique in the section.
        arguments: Of the section's `measure`, besides plan and rows.
        names: Rows it makes; all there already means nothing is to be done.
    """

    section: str
    name: str
    arguments: dict[str, Any]
    names: tuple[str, ...]


def fixed_length(count: int) -> SamplingParams:
    """Greedy, exactly `count` tokens."""
    from engine import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)


def first_token(engine: Engine) -> None:
    """Run one request of one token."""
    engine.generate([5, 6, 7], fixed_length(1))


def host_ms_per_step(before: Any, after: Any) -> tuple[int, float]:
    """(steps, mean host milliseconds of each) between two `Engine.stats()`."""
    steps = after.steps - before.steps
    host_ms = after.host_ms_per_step * after.steps - before.host_ms_per_step * before.steps
    return steps, host_ms / max(steps, 1)
