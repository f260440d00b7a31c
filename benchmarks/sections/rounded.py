"""Decoding and prefill of one shape with `quantization=` in every form, beside plain bfloat16.

* decode-B: milliseconds per step in which B sequences of 256 tokens decode (see `growth`), and the
  share of it that reading weights and keys once takes at the GPU's copy bandwidth
* prefill: prompt tokens per second, 8 prompts of 2048 tokens at once
* weights_gib: as the engine counts them; start_s: constructor to first token
"""

from __future__ import annotations

import time

from plan import Job, Plan, first_token, fixed_length
from rows import RowFile
from sections.growth import decode_step_ms, fits, random_requests
from workloads import SHAPES

SECTION = "rounded"
KINDS = ("bfloat16", "int4", "int8", "fp8")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXT = 256
PEAK_GB_PER_S = 3000.0
"""Measured copy bandwidth of an H100 SXM."""


def jobs(plan: Plan) -> list[Job]:
    """One job per kind, each with an engine of its own."""
    shape = plan.shape_for("llama-8b")
    kinds = KINDS[:2] if plan.is_quick else KINDS
    return [
        Job(
            SECTION,
            f"{shape}/{kind}/all",
            {"shape": shape, "kind": kind},
            tuple(f"{shape}/{kind}/decode-{batch}" for batch in _batches(plan)),
        )
        for kind in kinds
    ]


def _batches(plan: Plan) -> tuple[int, ...]:
    return BATCHES[:2] if plan.is_quick else BATCHES


def measure(plan: Plan, rows: RowFile, *, shape: str, kind: str) -> None:
    """All figures of one kind."""
    config = SHAPES[shape]
    quantization = None if kind == "bfloat16" else kind
    started_s = time.perf_counter()
    with plan.make_engine(shape, quantization=quantization, max_num_seqs=256) as engine:
        first_token(engine)

        def add(figure: str, value: float, unit: str, **more: float) -> None:
            rows.add(
                SECTION,
                f"{shape}/{kind}/{figure}",
                value,
                unit,
                shape=shape,
                kind=kind,
                figure=figure,
                **more,
            )

        add("start_s", time.perf_counter() - started_s, "s")
        weight_bytes = engine.stats().weight_bytes
        add("weights_gib", weight_bytes / 2**30, "GiB")
        # Of an embedding of its own only single rows are read.
        if not config["tie_word_embeddings"]:
            weight_bytes -= config["vocab_size"] * config["hidden_size"] * 2
        kv_heads = config["num_key_value_heads"]
        kv_bytes = 4 * config["num_hidden_layers"] * kv_heads * config["head_dim"] * CONTEXT
        for batch in _batches(plan):
            if not fits(engine, batch, CONTEXT):
                continue
            engine.reset_prefix_cache()
            step_ms = decode_step_ms(engine, batch, CONTEXT, config["vocab_size"])
            floor_ms = (weight_bytes + batch * kv_bytes) / PEAK_GB_PER_S / 1e6
            add(f"decode-{batch}", step_ms, "ms", batch=batch, floor_share=floor_ms / step_ms)
        prompts = [
            prompt
            for prompt, _ in random_requests(
                2 if plan.is_quick else 8, 32 if plan.is_quick else 2048, 0, config["vocab_size"]
            )
        ]
        engine.generate(prompts, fixed_length(1))
        engine.reset_prefix_cache()
        started_s = time.perf_counter()
        engine.generate(prompts, fixed_length(1))
        num_tokens = sum(len(prompt) for prompt in prompts)
        add("prefill", num_tokens / (time.perf_counter() - started_s), "tok/s")
