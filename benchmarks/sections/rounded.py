"""Decoding and prefill with `quantization=` in every form, beside plain bfloat16.

A dense model, and one with experts (eight layers of Qwen3-30B-A3B) in bfloat16 and int4.

* decode-B: milliseconds per step in which B sequences of 256 tokens decode (see `growth`), and the
  share of it that reading weights and keys once takes at the GPU's copy bandwidth; of experts those
  count that B tokens choose on average if all are equally likely
* prefill: prompt tokens per second, 8 prompts of 2048 tokens at once
* weights_gib: as the engine counts them; start_s: constructor to first token
* load_peak_gib: torch's largest allocation until then, KV cache included
"""

from __future__ import annotations

import time
from typing import Any

import torch
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
EXPERTS = "qwen3-moe"
SHAPES[EXPERTS] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
}


def jobs(plan: Plan) -> list[Job]:
    """One job per shape and kind, each with an engine of its own."""
    dense = plan.shape_for("llama-8b")
    pairs = [(dense, kind) for kind in (KINDS[:2] if plan.is_quick else KINDS)]
    if not plan.is_quick:
        pairs += [(EXPERTS, kind) for kind in KINDS[:2]]
    return [
        Job(
            SECTION,
            f"{shape}/{kind}/all",
            {"shape": shape, "kind": kind},
            tuple(f"{shape}/{kind}/decode-{batch}" for batch in _batches(plan)),
        )
        for shape, kind in pairs
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
        if plan.device == "cuda":
            add("load_peak_gib", torch.cuda.max_memory_allocated() / 2**30, "GiB")
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
            num_bytes = weight_bytes * _share_read(config, batch) + batch * kv_bytes
            floor_ms = num_bytes / PEAK_GB_PER_S / 1e6
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


def _share_read(config: dict[str, Any], batch: int) -> float:
    """The part of the weights' bytes that a step of `batch` tokens reads."""
    if "num_experts" not in config:
        return 1.0
    num_experts = config["num_experts"]
    of_experts = 3 * config["moe_intermediate_size"] * num_experts
    heads = config["num_attention_heads"] + config["num_key_value_heads"]
    of_layer = of_experts + 2 * heads * config["head_dim"]
    all_numbers = config["num_hidden_layers"] * of_layer + config["vocab_size"]
    chosen = 1.0 - (1.0 - config["num_experts_per_tok"] / num_experts) ** batch
    unread = config["num_hidden_layers"] * of_experts * (1.0 - chosen)
    return 1.0 - unread / all_numbers
