"""`Engine.score` and pooled decoders, against transformers on tiny random models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from model_zoo import SIZES
from safetensors.torch import save_file
from tiny_checkpoints import write_byte_tokenizer, write_tiny_llama
from tiny_encoders import FAMILIES, write_encoder, write_layout

from engine import (
    ContextOverflowError,
    Engine,
    RequestError,
    RequestTimeoutError,
    SamplingParams,
    UnsupportedModelError,
)

QUERY = "what is it?"
DOCUMENTS = ["it is a word.", "", "some other text, longer than the first one", "abc 123"]


def open_engine(folder: Path, **options: Any) -> Engine:
    return Engine(str(folder), device="cpu", num_threads=1, **options)


# -------------------------------------------------------------------- cross-encoders


def hf_scores(model: Any, folder: Path, queries: list[str], limit: int = 198) -> np.ndarray:
    """Pair by pair, through the `tokenizers` library's own pairs and truncation."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.no_padding()
    backend.enable_truncation(limit, strategy="longest_first")
    scores = []
    for query, document in zip(queries, DOCUMENTS, strict=True):
        encoding = backend.encode(query, document)
        inputs = {"input_ids": torch.tensor([encoding.ids])}
        if 1 in encoding.type_ids:
            inputs["token_type_ids"] = torch.tensor([encoding.type_ids])
        with torch.no_grad():
            scores.append(model(**inputs).logits[0, 0].item())
    return np.array(scores)


@pytest.mark.parametrize("family", FAMILIES)
def test_cross_encoders(family: str, tmp_path: Path) -> None:
    model = write_encoder(tmp_path, family, "ForSequenceClassification", num_labels=1)
    with open_engine(tmp_path) as engine:
        assert engine.task == "score"
        expected = hf_scores(model, tmp_path, [QUERY] * 4)
        scores = engine.score(QUERY, DOCUMENTS)
        assert np.abs(scores - 1 / (1 + np.exp(-expected))).max() < 1e-5
        queries = [QUERY, "a", QUERY, "b"]
        expected = hf_scores(model, tmp_path, queries)
        scores = engine.score(queries, DOCUMENTS)
        assert np.abs(scores - 1 / (1 + np.exp(-expected))).max() < 1e-5
        assert np.array_equal(engine.score("a", DOCUMENTS[1]), scores[1:2])
        with pytest.raises(RequestError, match=r"scores pairs.*Use Engine\.score"):
            engine.embed("x")


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A cross-encoder whose config asks for raw scores and for at most 30 tokens."""
    folder = tmp_path_factory.mktemp("scorer")
    identity = "torch.nn.modules.linear.Identity"
    model = write_encoder(folder, "bert", "ForSequenceClassification", num_labels=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "sbert_ce_default_activation_function": identity})
    )
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**tokenizer_config, "model_max_length": 30})
    )
    return folder, model


@pytest.mark.parametrize("placement", ["thread", "process"])
def test_raw_scores_and_truncation(scorer: tuple[Path, Any], placement: str) -> None:
    folder, model = scorer
    with open_engine(folder, placement=placement) as engine:
        with pytest.raises(ContextOverflowError, match=r"documents\[2\] with its query has 47"):
            engine.score(QUERY, DOCUMENTS)
        expected = hf_scores(model, folder, [QUERY] * 4, limit=30)
        scores = engine.score(QUERY, DOCUMENTS, on_overflow="truncate")
        assert np.abs(scores - expected).max() < 1e-5
        assert engine.score(QUERY, []).shape == (0,)
        found = asyncio.run(engine.ascore(QUERY, DOCUMENTS, on_overflow="truncate"))
        assert np.array_equal(found, scores)


def test_bad_input(scorer: tuple[Path, Any]) -> None:
    with open_engine(scorer[0]) as engine:
        for query, documents, named in (
            (["a", "b"], ["c"], "2 queries were given for 1 documents"),
            ("a", 3, "documents must be a list"),
            (3, ["a"], "query must be a list"),
            ("a", [3], r"documents\[0\] is int"),
            ("a", ["\ud800"], r"documents\[0\] holds the lone surrogate"),
        ):
            with pytest.raises(RequestError, match=named):
                engine.score(query, documents)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="instruction='x' is read by models that generate"):
            engine.score("a", ["b"], instruction="x")
        with pytest.raises(RequestTimeoutError):
            engine.score("a", [f"{n} word" for n in range(3000)], timeout=0.001)
        with pytest.raises(RequestError, match="cannot generate"):
            engine.generate("x")


def test_what_cannot_score(tmp_path: Path) -> None:
    write_encoder(tmp_path, "bert", "ForSequenceClassification", num_labels=3)
    with pytest.raises(UnsupportedModelError, match="has 3 labels"):
        open_engine(tmp_path)
    with pytest.raises(UnsupportedModelError, match="scores texts and cannot embed"):
        open_engine(tmp_path, task="embed")


# -------------------------------------------------------------------- models that embed


def test_embedding_models_score_by_cosine(tmp_path: Path) -> None:
    write_encoder(tmp_path)
    write_layout(
        tmp_path,
        modules=("Transformer", "Pooling"),
        prompts={"query": "query: ", "document": "text: "},
    )
    with open_engine(tmp_path) as engine:
        query = engine.embed("query: " + QUERY, normalize=True)
        documents = engine.embed(["text: " + one for one in DOCUMENTS], normalize=True)
        assert np.abs(engine.score(QUERY, DOCUMENTS) - documents @ query).max() < 1e-6
        paired = engine.score([QUERY, "a", QUERY, "a"], DOCUMENTS)
        assert np.allclose(paired[[0, 2]], (documents @ query)[[0, 2]], atol=1e-6)
        other = engine.embed("query: a", normalize=True)
        assert np.allclose(paired[[1, 3]], (documents @ other)[[1, 3]], atol=1e-6)
        assert np.abs(documents @ other - documents @ query).max() > 1e-4


def test_dense_layers_after_pooling(tmp_path: Path) -> None:
    write_encoder(tmp_path)
    write_layout(
        tmp_path,
        modules=("Transformer", "Pooling", "Dense"),
        pooling={"pooling_mode": ["cls", "mean"]},
    )
    path = tmp_path / "2_Dense"
    path.mkdir()
    weight, bias = torch.randn(10, 128) / 8, torch.randn(10)
    save_file({"linear.weight": weight, "linear.bias": bias}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"in_features": 128, "out_features": 10}))
    with open_engine(tmp_path) as engine:
        assert engine.embedding_width == 10
        parts = []
        for pooling in ("cls", "mean"):
            (tmp_path / "modules.json").rename(tmp_path / "hidden")
            with open_engine(tmp_path, pooling=pooling) as other:
                parts.append(other.embed(DOCUMENTS))
            (tmp_path / "hidden").rename(tmp_path / "modules.json")
        expected = torch.tanh(torch.from_numpy(np.hstack(parts)) @ weight.T + bias).numpy()
        assert np.abs(engine.embed(DOCUMENTS) - expected).max() < 1e-5
    with pytest.raises(UnsupportedModelError, match="takes 128 features, but gets 64"):
        open_engine(tmp_path, pooling="mean")


# -------------------------------------------------------------------- pooled decoders

DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 32},
    "Mistral": {"sliding_window": 19},
    "Gemma2": {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
}


def write_decoder(folder: Path, name: str, ending: str, **changes: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(
        **{**SIZES, "vocab_size": 300, **DECODERS[name], **changes}
    )
    torch.manual_seed(3)
    model = getattr(transformers, f"{name}{ending}")(config).eval()
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return model


TEXTS = ["a", "some words", "x" * 70, "in the end there is an answer to it", "1234 ?"]


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("ending", ["Model", "ForCausalLM"])
def test_decoders_embed(name: str, ending: str, tmp_path: Path) -> None:
    model = write_decoder(tmp_path, name, ending)
    bare = getattr(model, "model", model)
    options = {} if ending == "Model" else {"task": "embed"}
    for pooling, pooled in (("auto", lambda rows: rows[-1]), ("mean", lambda rows: rows.mean(0))):
        with open_engine(tmp_path, pooling=pooling, **options) as engine:
            assert engine.task == "embed"
            vectors = engine.embed(TEXTS)
            for text, vector in zip(TEXTS, vectors, strict=True):
                with torch.no_grad():
                    rows = bare(torch.tensor([engine.tokenize(text)])).last_hidden_state[0]
                assert np.abs(vector - pooled(rows).numpy()).max() < 1e-4
            with pytest.raises(RequestError, match=r"texts\[1\] is empty"):
                engine.embed(["a", ""])


def test_a_decoder_in_the_layout_of_sentence_transformers(tmp_path: Path) -> None:
    """As Qwen3-Embedding is: last token, normalised, a prompt for queries."""
    write_decoder(tmp_path, "Qwen3", "ForCausalLM")
    write_layout(
        tmp_path,
        pooling={"pooling_mode_lasttoken": True},
        prompts={"query": "Instruct: find it\nQuery:", "document": ""},
    )
    with open_engine(tmp_path) as engine:
        assert engine.task == "embed"
        assert np.linalg.norm(engine.embed("x")) == pytest.approx(1)
        assert engine.score("x", ["y", "z"]).shape == (2,)
    with open_engine(tmp_path, task="generate") as engine:
        engine.generate("x", SamplingParams(max_tokens=1))


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_decoders_with_a_score(name: str, tmp_path: Path) -> None:
    model = write_decoder(tmp_path, name, "ForSequenceClassification", num_labels=1)
    with open_engine(tmp_path) as engine:
        scores = engine.score("in", TEXTS)
        for text, score in zip(TEXTS, scores, strict=True):
            ids = engine.tokenize("in") + engine.tokenize(text)
            with torch.no_grad():
                logit = model(torch.tensor([ids])).logits[0, 0]
            assert score == pytest.approx(torch.sigmoid(logit).item(), abs=1e-5)


def test_neighbours_do_not_change_a_pooled_decoder(tmp_path: Path) -> None:
    write_decoder(tmp_path, "Llama", "Model")
    with open_engine(tmp_path) as engine:
        texts = [f"{n} " + "y" * (n % 90) for n in range(120)]
        for text, vector in zip(texts, engine.embed(texts), strict=True):
            assert np.array_equal(engine.embed(text), vector)


@pytest.mark.demo_model
def test_the_demo_model_embeds(demo_model: str) -> None:
    """In bfloat16, its own dtype: against the decoder's logits path in float32."""
    texts = ["The ferry leaves at nine.", "A boat departs at 9 o'clock.", "Bananas are yellow."]
    with Engine(demo_model, device="cpu", num_threads=1, task="embed", pooling="mean") as engine:
        vectors = engine.embed(texts, normalize=True)
    assert vectors.shape == (3, 576)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]


# -------------------------------------------------------------------- judged by a model


def test_yes_against_no(tiny_llama: Path, tiny_engine: Engine) -> None:
    """The score is the softmax of the two first tokens' logits after the whole prompt."""
    from engine.relevance import DEFAULT_INSTRUCTION

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    scores = tiny_engine.score("where?", ["here", "there"])
    yes, no = (tiny_engine.tokenize(word)[0] for word in ("Yes", "No"))
    for document, score in zip(["here", "there"], scores, strict=True):
        text = (
            f"{DEFAULT_INSTRUCTION} Answer with Yes or No.\n\nQuery: where?\n\n"
            f"Document: {document}\n\n{DEFAULT_INSTRUCTION}"
        )
        ids = tiny_engine.apply_chat_template([{"role": "user", "content": text}])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        expected = torch.softmax(logits[[yes, no]], 0)[0].item()
        assert score == pytest.approx(expected, abs=1e-4)


def test_judging_reuses_the_prompts_blocks(tiny_engine: Engine) -> None:
    handle = tiny_engine.submit_score("q" * 100, [f"{n} " * 20 for n in range(4)])
    output = handle.result(timeout=60)
    assert output.vectors.shape == (4, 1)
    assert output.usage.cached_tokens > 0.6 * output.usage.prompt_tokens


def test_judging_long_documents(tiny_engine: Engine) -> None:
    long = "word " * 1000
    with pytest.raises(ContextOverflowError, match=r"documents\[1\] makes a prompt of"):
        tiny_engine.score("q", ["short", long])
    assert np.isfinite(tiny_engine.score("q", ["short", long], on_overflow="truncate")).all()
    with pytest.raises(ContextOverflowError, match="leaves no room"):
        tiny_engine.score("q" * 900, ["short"], on_overflow="truncate")
    with pytest.raises(RequestError, match="on_overflow='x'"):
        tiny_engine.score("q", ["short"], on_overflow="x")


async def test_judging_is_async_and_can_be_given_up(tiny_engine: Engine) -> None:
    documents = [f"{n} word" for n in range(20)]
    expected = tiny_engine.score("q", documents, instruction="Is this a word?")
    found = await tiny_engine.ascore("q", documents, instruction="Is this a word?")
    assert np.allclose(found, expected, atol=1e-5)
    task = asyncio.create_task(tiny_engine.ascore("q", [f"{n} text " * 9 for n in range(200)]))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_both_placements_judge_alike(engine_in: Callable[[str], Engine]) -> None:
    found = [engine_in(one).score("q", ["a", "b", "c"]) for one in ("thread", "process")]
    assert np.array_equal(*found)


def test_a_tokenizer_that_cannot_tell_yes_from_no(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    with open_engine(tmp_path) as engine:
        engine.tokenize = lambda text, **_: [5]  # type: ignore[method-assign,assignment]
        with pytest.raises(RequestError, match="with the same first token"):
            engine.score("q", ["a"])
