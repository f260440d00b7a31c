"""Benchmark rows as a run on a GPU would write them."""

from rows import RowFile, load_rows

GPU = {
    "commit": "abc1234",
    "date": "2026-11-25",
    "gpu": "NVIDIA H100 80GB HBM3",
    "driver": "580.159",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "is_quick": False,
}


def sample_rows(path):
    """One row or more of every section, written as a run writes them."""
    rows = RowFile(path, GPU)
    on = {"shape": "llama-135m", "placement": "default"}
    rows.add("table", "llama-135m/start", 4.9, "s", kv_blocks=9, gpu_used_gib=70.0, **on)
    for run, seconds in (("first", 2.5), ("second", 2.0)):
        rows.add(
            "table",
            f"llama-135m/chat/{run}",
            seconds,
            "s",
            output_tokens_per_s=214939 / seconds,
            host_ms_per_step=0.4,
            kv_blocks=9,
            gpu_used_gib=70.0,
            **on,
        )
    for count, kept in ((0, 1.0), (1, 0.8)):
        rows.add(
            "busy",
            f"llama-135m/spinners-{count}",
            2.0 / kept,
            "s",
            spinners=count,
            kept_share=kept,
            spinner_kept_share=0.7 if count else None,
            output_tokens_per_s=1000.0,
            host_ms_per_step=0.5,
            **on,
        )
    for rate in (2.0, 8.0):
        figures = {f"{a}_p{p}_ms": rate * p for a in ("ttft", "itl") for p in (50, 95, 99)}
        name = f"llama-135m/rate-{rate:g}"
        details = {"rate": rate, "requests": 40, "output_tokens_per_s": 1e3, **figures}
        rows.add("latency", name, rate * 50, "ms", **details, **on)
    for case, seconds in (("Engine.generate", 2.0), ("ChatLocal.batch", 2.2)):
        rows.add(
            "frameworks",
            f"llama-135m/{case}",
            seconds,
            "s",
            case=case,
            requests=1000,
            against="Engine.generate",
            seconds_of_engine=2.0,
            output_tokens_per_s=1e5,
            **on,
        )
    for count in (1, 512):
        rows.add("growth", f"llama-135m/running-{count}", 9e2 * count, "tok/s", running=count, **on)
    for context in (1024, 32768):
        name = f"llama-135m/context-{context}x32"
        rows.add("growth", name, context / 1e3, "ms", batch=32, context=context, **on)
    rows.add("memory", "llama-135m/used-share", 0.85, "of the GPU", **on)
    rows.add("host", "ChatLocal.batch", 2.2, "s", requests=1000, caller_cpu_s=0.1, over=0.05)
    rows.add("callers", "ChatLocal.batch", 70.0, "µs/request", shape="tiny")
    rows.add("llama_index", "achat/256", 0.6, "s", calls=256)
    for peer, value in (("ours", 60.0), ("transformers", 30.0)):
        rows.add(
            "cpu",
            f"{peer}/decode_tok_s",
            value,
            "tok/s",
            peer=peer,
            figure="decode_tok_s",
            busy_neighbour=False,
        )
    rows.add(
        "cpu",
        "ours+busy/decode_tok_s",
        45.0,
        "tok/s",
        peer="ours",
        figure="decode_tok_s",
        busy_neighbour=True,
    )
    for peer, value, query_ms in (("ours", 200.0, 2.0), ("loop", 100.0, 5.0)):
        on_minilm = {"model": "minilm", "peer": peer, "dtype": "float32"}
        rows.add("embed", f"minilm/{peer}/texts_s", value, "texts/s", **on_minilm)
        rows.add("embed", f"minilm/{peer}/query_ms", query_ms, "ms", **on_minilm)
    rows.add(
        "embed", "minilm/ours/gathered_texts_s", 150.0, "texts/s", **{**on_minilm, "peer": "ours"}
    )
    for case, value, over in (("free", 1.0, 0.0), ("constrained", 1.05, 0.05)):
        rows.add(
            "constrained",
            f"llama-135m/{case}",
            value,
            "s",
            case=case,
            requests=64,
            over_free=over,
            output_tokens_per_s=12_000 / value,
            steps=200,
            **on,
        )
    for kind, value in (("gguf", 90.0), ("awq", 80.0)):
        rows.add("quantised", f"{kind}/decode_tok_s", value, "tok/s", kind=kind)
    for kind, value in (("bfloat16", 6.0), ("int4", 2.4)):
        facts = {"shape": "llama-8b", "kind": kind, "figure": "decode-1", "floor_share": 0.8}
        rows.add("rounded", f"llama-8b/{kind}/decode-1", value, "ms", **facts)
    rows.add("cpu", "import/engine", 0.02, "s", module="engine")
    return load_rows(path)
