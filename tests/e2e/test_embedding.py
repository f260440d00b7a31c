"""`Engine.embed`: the vectors of the libraries users come from, and every way a call can end."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_encoders import write_encoder, write_layout

from engine import (
    ConfigError,
    ContextOverflowError,
    Engine,
    EngineClosedError,
    RequestAbortedError,
    RequestError,
    RequestTimeoutError,
    SamplingParams,
    StepError,
    UnsupportedModelError,
)

PROMPTS = {"query": "question: ", "passage": "text: "}
TEXTS = ["some words", "a", "more of the same words", "some words", "1234 ?"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(folder of a tiny BERT with mean pooling and prompts, the transformers model)."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    model = write_encoder(folder)
    write_layout(folder, prompts=PROMPTS, max_seq_length=64)
    return folder, model


@pytest.fixture(scope="module")
def embedder_in(tiny: tuple[Path, Any]) -> Iterator[Callable[[str], Engine]]:
    made: dict[str, Engine] = {}

    def embedder_in(placement: str) -> Engine:
        if placement not in made:
            made[placement] = Engine(str(tiny[0]), device="cpu", num_threads=1, placement=placement)
        return made[placement]

    yield embedder_in
    for engine in made.values():
        engine.close()


@pytest.fixture(params=["thread", "process"])
def embedder(request: pytest.FixtureRequest, embedder_in: Callable[[str], Engine]) -> Engine:
    return embedder_in(request.param)


def reference(model: Any, engine: Engine, texts: list[str], limit: int = 64) -> np.ndarray:
    """Text by text through transformers, mean over all tokens, normalised; in float64."""
    vectors = []
    for text in texts:
        ids = engine.tokenize(text)
        ids = ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0].double()
        mean = hidden.mean(0).numpy()
        vectors.append(mean / np.linalg.norm(mean))
    return np.array(vectors)


# -------------------------------------------------------------------- the numbers


@pytest.mark.embedding_model
def test_vectors_are_those_of_sentence_transformers(
    embedding_model: str, support_dir: Path
) -> None:
    """Recorded ones; the file says with which versions."""
    recorded = json.loads((support_dir / "minilm_vectors.json").read_text())
    expected = np.array(
        [np.frombuffer(base64.b64decode(one), np.float32) for one in recorded["vectors"]]
    )
    with Engine(embedding_model, device="cpu", num_threads=1) as engine:
        vectors = engine.embed(recorded["texts"], on_overflow="truncate")
        assert vectors.shape == (len(expected), 384)
        assert vectors.dtype == np.float32
        assert np.abs(vectors - expected).max() < 1e-6
        # The sixth text is longer than the 256 tokens that the model was made for.
        with pytest.raises(ContextOverflowError, match=r"texts\[5\].*the model reads 256"):
            engine.embed(recorded["texts"])


@pytest.mark.embedding_model
def test_vectors_are_those_of_transformers(embedding_model: str) -> None:
    from transformers import AutoModel, AutoTokenizer

    from engine.loader.resolve import PACKAGED_MODELS, find_packaged

    folder = find_packaged(PACKAGED_MODELS[embedding_model])
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [" ".join(["word", "and", "number", str(n)] * (n % 17)) for n in range(40)]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    with Engine(embedding_model, device="cpu", num_threads=1) as engine:
        assert np.abs(engine.embed(texts) - expected).max() < 1e-6


def test_tiny_model_equals_transformers(embedder: Engine, tiny: tuple[Path, Any]) -> None:
    vectors = embedder.embed(TEXTS)
    assert np.abs(vectors - reference(tiny[1], embedder, TEXTS)).max() < 1e-5
    assert embedder.task == "embed"
    assert embedder.embedding_width == vectors.shape[1] == 64


def test_results_do_not_depend_on_the_batch(embedder: Engine) -> None:
    """Bit by bit, with one thread on a CPU."""
    texts = ["x" * n for n in (1, 2, 3, 30, 60)] + [f"text {n}" for n in range(100)]
    together = embedder.embed(texts)
    for text, vector in zip(texts, together, strict=True):
        assert np.array_equal(embedder.embed(text), vector)


def test_one_text_and_token_ids(embedder: Engine) -> None:
    vector = embedder.embed("some words")
    assert vector.shape == (64,)
    ids = embedder.tokenize("some words")
    assert np.array_equal(embedder.embed(ids), vector)
    assert np.array_equal(embedder.embed(np.array(ids)), vector)
    assert np.array_equal(embedder.embed([ids, "some words"]), [vector, vector])


def test_equal_texts_are_computed_once(embedder: Engine) -> None:
    before = embedder.stats().prompt_tokens
    vectors = embedder.embed(["repeated"] * 50 + ["other"])
    assert len(vectors) == 51
    assert (vectors[:50] == vectors[0]).all()
    num_tokens = sum(len(embedder.tokenize(text)) for text in ("repeated", "other"))
    assert embedder.stats().prompt_tokens - before == num_tokens


def test_empty_list_and_empty_text(embedder: Engine) -> None:
    assert embedder.embed([]).shape == (0, 64)
    assert embedder.submit_embed([]).result().usage.prompt_tokens == 0
    assert np.isfinite(embedder.embed("")).all()  # [CLS] [SEP]


# -------------------------------------------------------------------- options


def test_prompts(embedder: Engine) -> None:
    assert embedder.embedding_prompts == PROMPTS
    for name, text in (("query", "question: "), ("document", "text: "), ("passage", "text: ")):
        expected = embedder.embed(text + "some words")
        assert np.array_equal(embedder.embed("some words", prompt_name=name), expected)
        assert np.array_equal(embedder.embed("some words", prompt=text), expected)
    assert not np.array_equal(embedder.embed("some words"), expected)
    with pytest.raises(RequestError, match="Did you mean 'passage'"):
        embedder.embed("some words", prompt_name="pasage")
    with pytest.raises(RequestError, match="Give one of them"):
        embedder.embed("some words", prompt_name="query", prompt="x")


def test_default_prompt(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    write_encoder(tmp_path)
    write_layout(tmp_path, prompts={"web": "web: "}, default_prompt_name="web")
    with Engine(str(tmp_path), device="cpu", num_threads=1) as engine:
        expected = engine.embed("web: words", prompt="")
        assert np.array_equal(engine.embed("words"), expected)
        assert np.array_equal(engine.embed("words", prompt_name="query"), expected)


def test_normalize_and_dimensions(embedder: Engine) -> None:
    whole = embedder.embed(TEXTS)
    raw = embedder.embed(TEXTS, normalize=False)
    assert np.abs(np.linalg.norm(whole, axis=1) - 1).max() < 1e-6
    assert np.linalg.norm(raw, axis=1).max() > 1.5
    short = embedder.embed(TEXTS, dimensions=16)
    assert short.shape == (5, 16)
    cut = raw[:, :16]
    assert np.abs(short - cut / np.linalg.norm(cut, axis=1, keepdims=True)).max() < 1e-6
    assert np.array_equal(embedder.embed(TEXTS, dimensions=16, normalize=False), cut)


@pytest.mark.parametrize("dimensions", [0, -1, 65, 1.5, True])
def test_impossible_dimensions(embedder: Engine, dimensions: Any) -> None:
    with pytest.raises(RequestError, match="dimensions="):
        embedder.embed("x", dimensions=dimensions)


def test_long_texts(embedder: Engine, tiny: tuple[Path, Any]) -> None:
    long = "abcdefghij " * 20
    for text in (long, embedder.tokenize(long)):
        with pytest.raises(ContextOverflowError, match=r"texts\[1\] has 202 tokens.*truncate"):
            embedder.embed(["fine", text])
    [vector] = embedder.embed([long], on_overflow="truncate")
    assert np.abs(vector - reference(tiny[1], embedder, [long])[0]).max() < 1e-5
    with pytest.raises(RequestError, match="on_overflow='cut' must be one of error, truncate"):
        embedder.embed("x", on_overflow="cut")


def test_a_million_characters(embedder: Engine) -> None:
    huge = "lorem ipsum " * 83_334
    with pytest.raises(ContextOverflowError, match="the model reads 64"):
        embedder.embed([huge])
    cut = embedder.embed([huge, "x" * 1_000_000], on_overflow="truncate")
    assert np.isfinite(cut).all()


@pytest.mark.parametrize("texts", [None, 3, [None], [3.5], {"a": 1}, b"bytes", [[]], ["\ud800"]])
def test_what_is_no_text(embedder: Engine, texts: Any) -> None:
    with pytest.raises(RequestError):
        embedder.embed(texts)


def test_token_ids_out_of_range(embedder: Engine) -> None:
    with pytest.raises(RequestError, match="is no token id of this model"):
        embedder.embed([1, 120])


def test_a_text_cannot_forge_control_tokens(embedder: Engine) -> None:
    assert embedder.tokenize("[SEP]").count(3) == 1
    assert not np.array_equal(embedder.embed("a [SEP] b"), embedder.embed([2, 5, 3, 6, 3]))


def test_pooling_of_choice(tiny: tuple[Path, Any]) -> None:
    folder, model = tiny
    with Engine(str(folder), device="cpu", num_threads=1, pooling="cls") as engine:
        vector = engine.embed("some words", normalize=False)
        ids = torch.tensor([engine.tokenize("some words")])
        with torch.no_grad():
            expected = model(input_ids=ids).last_hidden_state[0, 0].numpy()
        assert np.abs(vector - expected).max() < 1e-5
    with pytest.raises(ConfigError, match="pooling='median'"):
        Engine(str(folder), pooling="median")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(tiny: tuple[Path, Any], embedder: Engine, dtype: str) -> None:
    with Engine(str(tiny[0]), device="cpu", num_threads=1, dtype=dtype) as engine:
        vectors = engine.embed(TEXTS)
    assert vectors.dtype == np.float32
    assert (vectors * embedder.embed(TEXTS)).sum(1).min() > 0.999


def test_max_model_len(tiny: tuple[Path, Any]) -> None:
    """Beyond what the model was made for, within its positions, if that is asked for."""
    folder, _ = tiny
    with Engine(str(folder), device="cpu", num_threads=1, max_model_len=200) as engine:
        assert engine.max_model_len == 200
        engine.embed("x" * 150)
    with pytest.raises(ConfigError, match="at most 200"):
        Engine(str(folder), device="cpu", max_model_len=201)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_kv_blocks": 8}, "num_kv_blocks=8 sizes a KV cache"),
        ({"block_size": 64}, "block_size=64"),
        ({"kv_cache_memory_bytes": 1}, "kv_cache_memory_bytes=1"),
    ],
)
def test_options_without_a_meaning(
    tiny: tuple[Path, Any], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        Engine(str(tiny[0]), device="cpu", **options)


def test_pooling_of_a_model_that_generates(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"Add task='embed'"):
        Engine(str(tiny_llama), device="cpu", pooling="mean")


def test_texts_of_one_step(tiny: tuple[Path, Any]) -> None:
    with Engine(str(tiny[0]), device="cpu", num_threads=1, max_num_seqs=8) as engine:
        engine.embed([f"text {letter}" for letter in "abcdefghijklmnopqrst"])
        assert (engine.stats().peak_running, engine.stats().steps) == (8, 3)


# -------------------------------------------------------------------- what it is not


def test_an_encoder_does_not_generate(embedder: Engine, tiny: tuple[Path, Any]) -> None:
    for call in (
        lambda: embedder.generate("x", SamplingParams(max_tokens=1)),
        lambda: embedder.submit("x"),
        lambda: embedder.chat([{"role": "user", "content": "x"}]),
        lambda: next(embedder.stream("x")),
    ):
        with pytest.raises(RequestError, match="embeds or scores texts and cannot generate"):
            call()
    with pytest.raises(UnsupportedModelError, match="is an encoder and cannot generate"):
        Engine(str(tiny[0]), task="generate")


def test_a_model_that_generates_does_not_embed(tiny_engine: Engine) -> None:
    assert tiny_engine.task == "generate"
    with pytest.raises(RequestError, match="load it with task='embed'"):
        tiny_engine.embed("x")


# -------------------------------------------------------------------- many callers


def test_callers_share_batches(embedder: Engine) -> None:
    texts = [f"text number {n}" for n in range(64)]
    expected = embedder.embed(texts)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(embedder.embed, texts))
    assert np.array_equal(found, expected)
    assert embedder.stats().running == 0


async def test_async_calls_share_batches(embedder: Engine) -> None:
    texts = [f"text number {n}" for n in range(64)]
    steps = embedder.stats().steps
    found = await asyncio.gather(*(embedder.aembed(text) for text in texts))
    assert np.array_equal(found, await embedder.aembed(texts))
    assert embedder.stats().steps - steps < 40
    assert embedder.stats().peak_running > 1


def test_a_short_request_overtakes_a_long_one(embedder: Engine) -> None:
    long = embedder.submit_embed([f"document {n} {'word ' * 10}" for n in range(2000)])
    started_s = time.monotonic()
    embedder.embed("a query")
    query_s = time.monotonic() - started_s
    assert not long.is_done
    assert len(long.result().vectors) == 2000
    assert query_s < 0.5 * (time.monotonic() - started_s)


async def test_a_cancelled_task_drops_its_texts(embedder: Engine) -> None:
    aborted = embedder.stats().requests_aborted
    task = asyncio.create_task(embedder.aembed([f"{n} {'word ' * 10}" for n in range(6_000)]))
    while not embedder.stats().waiting:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await embedder.aembed("still there")
    stats = embedder.stats()
    assert (stats.requests_aborted, stats.running, stats.waiting) == (aborted + 1, 0, 0)


def test_timeout_and_abort(embedder: Engine) -> None:
    texts = [f"{n} {'word ' * 10}" for n in range(6_000)]
    with pytest.raises(RequestTimeoutError):
        embedder.embed(texts, timeout=0.01)
    handle = embedder.submit_embed(texts)
    handle.abort()
    with pytest.raises(RequestAbortedError, match="was aborted"):
        handle.result(timeout=30)
    assert "done" in repr(handle)


def test_usage_and_metrics(embedder: Engine) -> None:
    output = embedder.submit_embed(["one text", "another"]).result(timeout=30)
    assert output.usage.prompt_tokens == sum(
        len(embedder.tokenize(text)) for text in ("one text", "another")
    )
    assert output.usage.completion_tokens == 0
    assert output.metrics.total_s is not None
    assert output.metrics.queue_s is not None


# -------------------------------------------------------------------- ends


@pytest.mark.parametrize("placement", ["thread", "process"])
def test_close_while_a_call_waits(tiny: tuple[Path, Any], placement: str) -> None:
    engine = Engine(str(tiny[0]), device="cpu", num_threads=1, placement=placement)
    texts = [f"{n} {'word ' * 10}" for n in range(6_000)]
    handle = engine.submit_embed(texts)
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            handle.result()
        except BaseException as error:
            errors.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    engine.close(drain=False)
    waiter.join(30)
    assert [type(error).__name__ for error in errors] in (
        [EngineClosedError.__name__],
        ["EngineDeadError"],
    )
    with pytest.raises(EngineClosedError):
        engine.embed("x")


def test_drain_finishes_what_was_submitted(tiny: tuple[Path, Any]) -> None:
    with Engine(str(tiny[0]), device="cpu", num_threads=1) as engine:
        handle = engine.submit_embed([f"text {n}" for n in range(500)])
    assert len(handle.result().vectors) == 500


def test_a_failed_step_ends_its_requests_alone(
    tiny: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(str(tiny[0]), device="cpu", num_threads=1) as engine:
        runner = engine._host.parts.runner  # type: ignore[attr-defined]
        monkeypatch.setattr(runner._model, "forward", lambda *_: 1 / 0)
        with pytest.raises(StepError, match="ZeroDivisionError"):
            engine.embed("x")
        monkeypatch.undo()
        assert engine.embed("x").shape == (64,)
        assert engine.stats().requests_failed == 1


def test_numbers_that_are_not_finite(tiny: tuple[Path, Any], monkeypatch: Any) -> None:
    with Engine(str(tiny[0]), device="cpu", num_threads=1) as engine:
        model = engine._host.parts.runner._model  # type: ignore[attr-defined]
        forward = model.forward

        def spoiled(*arguments: Any) -> torch.Tensor:
            vectors = forward(*arguments)
            vectors[0, 3] = float("nan")
            return vectors

        monkeypatch.setattr(model, "forward", spoiled)
        with pytest.raises(StepError, match=r"Text 1 gave numbers that are not finite"):
            engine.embed(["longer text", "x"])


def test_shared_engines(tiny: tuple[Path, Any]) -> None:
    folder = str(tiny[0])
    first = Engine.shared(folder, device="cpu", num_threads=1)
    second = Engine.shared(folder, device="cpu", num_threads=1)
    assert first is second
    first.close()
    assert second.embed("x").shape == (64,)
    second.close()
    assert second.is_closed


def test_one_model_generates_and_embeds_side_by_side(tiny_llama: Path) -> None:
    options: dict[str, Any] = {"device": "cpu", "num_threads": 1}
    generating = Engine.shared(str(tiny_llama), **options)
    embedding = Engine.shared(str(tiny_llama), task="embed", **options)
    assert (generating.task, embedding.task) == ("generate", "embed")
    assert embedding.embed("x").shape == (64,)
    assert generating.generate("x", SamplingParams(max_tokens=1)).outputs
    generating.close()
    embedding.close()
