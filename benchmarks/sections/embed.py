"""Embeddings: this engine beside the loop that sentence-transformers runs, on the same texts.

The loop: texts sorted by length, batches of 32, padded, `transformers` on them, the mean, length 1.

* texts_s: a list of texts of 3 to 180 words, tokenizing included where there is a tokenizer
* gathered_texts_s: the same texts, one `aembed` each, all at once; the loop has no such thing
* query_ms: one text of ten words, the median

On a CPU the packaged all-MiniLM-L6-v2 in float32; on a GPU random weights of common shapes in
bfloat16, texts as token ids.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plan import Job, Plan
from rows import RowFile

SECTION = "embed"
PEERS = ("ours", "loop")
MODEL = "all-minilm-l6-v2"
_WORDS = "the ferry leaves for island harbour at nine with boats seals museum notes rain on Sunday"
_BERT = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
}
SHAPES: dict[str, dict[str, Any]] = {
    "minilm-l6": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12},
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "bert-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
"""Feed-forward halves are four times as wide as the hidden size."""

Texts = Sequence[str] | Sequence[list[int]]
Embed = Callable[[Texts], np.ndarray]


def jobs(plan: Plan) -> list[Job]:
    """One job per model and peer: peers leave threads behind that slow each other down."""
    models = (MODEL,) if plan.device == "cpu" else tuple(SHAPES)
    return [
        Job(SECTION, f"{model}/{peer}", {"model": model, "peer": peer}, (_name(model, peer),))
        for model in models
        for peer in PEERS
    ]


def _name(model: str, peer: str, figure: str = "texts_s") -> str:
    return f"{model}/{peer}/{figure}"


def measure(plan: Plan, rows: RowFile, *, model: str, peer: str) -> None:
    """All figures of one peer."""
    count = 16 if plan.is_quick else (512 if plan.device == "cpu" else 8192)
    texts = make_texts(count, as_ids=model in SHAPES)
    details = {"dtype": "float32" if model == MODEL else "bfloat16", "model": model, "peer": peer}

    def add(figure: str, value: float, unit: str) -> None:
        rows.add(SECTION, _name(model, peer, figure), value, unit, texts=count, **details)

    if peer == "loop":
        embed = loop_embedder(model, plan.device)
        _time_peer(embed, texts, add)
        return
    from engine import Engine

    options: dict[str, Any] = {"dtype": details["dtype"], "device": plan.device}
    if model in SHAPES:
        options |= {"load_format": "dummy"}
    with Engine(shape_folder(model) if model in SHAPES else model, **options) as engine:
        _time_peer(lambda given: engine.embed(given), texts, add)

        async def gathered() -> None:
            await asyncio.gather(*(engine.aembed(text) for text in texts))

        add("gathered_texts_s", count / _best_of(2, lambda: asyncio.run(gathered())), "texts/s")


def _time_peer(embed: Embed, texts: Texts, add: Callable[[str, float, str], None]) -> None:
    embed(texts[:64])
    add("texts_s", len(texts) / _best_of(3, lambda: embed(texts)), "texts/s")
    [query] = make_texts(1, as_ids=not isinstance(texts[0], str), num_words=10)
    times = [_best_of(1, lambda: embed([query])) for _ in range(20)]
    add("query_ms", 1e3 * statistics.median(times), "ms")


def _best_of(repeats: int, run: Callable[[], Any]) -> float:
    times = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - started_s)
    return min(times)


def make_texts(count: int, *, as_ids: bool, num_words: int | None = None) -> Any:
    """Texts of 3 to 180 words, always the same ones, as strings or as token ids."""
    rng = random.Random(0)
    words = _WORDS.split()
    sizes = [num_words or min(180, 3 + int(rng.lognormvariate(3.6, 0.8))) for _ in range(count)]
    if as_ids:
        return [[rng.randrange(1000, 30000) for _ in range(size)] for size in sizes]
    return [" ".join(rng.choices(words, k=size)) for size in sizes]


def shape_folder(shape: str) -> str:
    """A folder with the shape's `config.json`."""
    folder = Path(tempfile.mkdtemp(prefix=f"{shape}-"))
    (folder / "config.json").write_text(json.dumps(shape_config(shape)))
    return str(folder)


def shape_config(shape: str) -> dict[str, Any]:
    """BERT of a shape."""
    own = SHAPES[shape]
    return {**_BERT, **own, "intermediate_size": 4 * own["hidden_size"]}


def loop_embedder(model: str, device: str, batch_size: int = 32) -> Embed:
    """What users write today: sort, cut into batches, pad, run, pool."""
    import transformers

    tokenizer: Any = None
    if model in SHAPES:
        config = shape_config(model)
        encoder = transformers.BertModel(transformers.BertConfig(**config)).to(torch.bfloat16)
    else:
        from engine.loader.resolve import PACKAGED_MODELS, find_packaged

        folder = find_packaged(PACKAGED_MODELS[model])
        assert folder is not None, f"{model} is not installed"
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        encoder = transformers.AutoModel.from_pretrained(folder)
    encoder = encoder.to(device).eval()

    def batch_of(texts: Texts) -> dict[str, torch.Tensor]:
        if tokenizer is not None:
            return dict(
                tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
            )
        longest = max(map(len, texts))
        rows = [[*text, *[0] * (longest - len(text))] for text in texts]
        lens = torch.tensor([[len(text)] for text in texts])
        mask = (torch.arange(longest) < lens).long()
        return {"input_ids": torch.tensor(rows), "attention_mask": mask}

    @torch.inference_mode()
    def embed(texts: Texts) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        found: list[Any] = [None] * len(texts)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = batch_of([texts[place] for place in places])
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            hidden = encoder(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
            for place, vector in zip(places, vectors.float().cpu().numpy(), strict=True):
                found[place] = vector
        return np.stack(found)

    return embed
