"""Copies, pickles, dictionaries and the life of the shared engine. Fake engine."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.callbacks import CallbackManager
from llama_index.core.llms.loading import load_llm
from llama_index.core.types import BaseOutputParser
from llama_index_fake_engine import FakeEngine

import engine
from llm_connectors.llama_index import ConfigError, ForeignProcessError, LocalLLM

USER = [ChatMessage(content="Hi")]


def test_constructor_and_payload_load_nothing(shared_fakes: type[FakeEngine]) -> None:
    llm = LocalLLM("fake", temperature=0.0)
    assert llm.to_payload() == {"class_name": "LocalLLM", "model_name": "fake"}
    assert shared_fakes.num_made == 0
    llm.chat(USER)
    assert shared_fakes.num_made == 1
    assert llm.to_payload()["context_window"] == 4096


def test_equal_models_share_one_engine(shared_fakes: type[FakeEngine]) -> None:
    first, second = LocalLLM("fake"), LocalLLM("fake", temperature=0.0, max_tokens=3)
    assert first.engine is second.engine
    assert shared_fakes.num_made == 1


def test_async_use_loads_off_the_loop(shared_fakes: type[FakeEngine]) -> None:
    async def main() -> str:
        async with LocalLLM("fake") as llm:
            return (await llm.achat(USER)).message.content

    assert "Hi" in asyncio.run(main())
    assert shared_fakes._shared["fake"].is_closed


def test_close_is_idempotent_and_reopens(shared_fakes: type[FakeEngine]) -> None:
    with LocalLLM("fake") as llm:
        first = llm.load().engine
    assert first.is_closed
    llm.close()
    assert llm.chat(USER).message.content
    assert llm.engine is not first


def test_a_closed_engine_can_be_freed(shared_fakes: type[FakeEngine]) -> None:
    llm = LocalLLM("fake")
    llm.chat(USER)
    assert llm.metadata.model_name == "fake"
    engine_ref = weakref.ref(llm.engine)
    llm.close()
    shared_fakes._shared.pop("fake")._thread.join(5)
    gc.collect()
    assert engine_ref() is None


def test_close_leaves_the_engine_to_others_who_use_it(shared_fakes: type[FakeEngine]) -> None:
    first, second = LocalLLM("fake").load(), LocalLLM("fake").load()
    first.close()
    assert not second.engine.is_closed
    second.close()
    assert shared_fakes._shared["fake"].is_closed


def test_an_engine_that_nobody_uses_is_not_in_the_way(tiny_llama: Path) -> None:
    def make(**options: Any) -> LocalLLM:
        return LocalLLM(str(tiny_llama), engine_kwargs={"num_threads": 1, **options})

    used = make(device="cpu")
    first = used.engine
    with pytest.raises(ConfigError, match="max_num_seqs"):
        make(device="cpu", max_num_seqs=3).load()
    assert not first.is_closed
    # Nobody can close it any more: the object is gone, and was part of a cycle.
    used.additional_kwargs["itself"] = used
    del used
    other = make(device="cpu", max_num_seqs=3).load()
    assert first.is_closed
    assert other.engine.config.max_num_seqs == 3
    other.close()


def test_engine_passed_in_is_left_running(fake: FakeEngine) -> None:
    LocalLLM(engine=fake).close()
    assert not fake.is_closed


@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy, LocalLLM.model_copy])
@pytest.mark.parametrize("is_owned", [True, False])
def test_copies_share_the_engine(
    fake: FakeEngine, shared_fakes: type[FakeEngine], make_copy: object, is_owned: bool
) -> None:
    llm = LocalLLM(engine=fake) if is_owned else LocalLLM("fake")
    llm.additional_kwargs["min_tokens"] = 1
    clone = make_copy(llm)
    assert clone.engine is llm.engine
    assert clone.to_dict() == llm.to_dict()
    assert shared_fakes.num_made == (0 if is_owned else 1)


def test_closing_a_copy_leaves_the_original_alone(shared_fakes: type[FakeEngine]) -> None:
    llm = LocalLLM("fake").load()
    for clone in (copy.copy(llm), copy.deepcopy(llm), llm.with_options(max_tokens=3)):
        clone.load().close()
        assert llm.to_payload()["context_window"] == 4096
        assert not llm.engine.is_closed
    assert shared_fakes.num_made == 1


def test_deep_copy_of_a_cycle(fake: FakeEngine) -> None:
    class Parser(BaseOutputParser):
        llm: Any = None

        def parse(self, output: str) -> str:
            return output

    parser = Parser()
    parser.llm = LocalLLM(engine=fake, output_parser=parser)
    clone = copy.deepcopy(parser.llm)
    assert clone.output_parser.llm is clone


def test_deep_copies_have_fields_of_their_own(fake: FakeEngine) -> None:
    llm = LocalLLM(engine=fake, additional_kwargs={"min_tokens": 1})
    clone = copy.deepcopy(llm)
    clone.additional_kwargs["min_tokens"] = 2
    clone.temperature = 1.0
    assert llm.additional_kwargs == {"min_tokens": 1}
    assert llm.temperature == 0.1
    assert clone.callback_manager is llm.callback_manager
    holder = {"a": llm, "b": llm}
    copied = copy.deepcopy(holder)
    assert copied["a"] is copied["b"] is not llm


@pytest.mark.parametrize("is_owned", [True, False])
def test_dict_and_pickle_round_trips_find_the_engine(
    fake: FakeEngine, shared_fakes: type[FakeEngine], is_owned: bool
) -> None:
    options = {"temperature": 0.3, "stop": ["x"], "system_prompt": "Be brief.", "seed": 3}
    llm = LocalLLM(engine=fake, **options) if is_owned else LocalLLM("fake", **options)
    data = llm.to_dict()
    json.dumps(data)
    for twin in (
        LocalLLM.from_dict(data),
        load_llm(data),
        LocalLLM.from_json(llm.to_json()),
        pickle.loads(pickle.dumps(llm)),
    ):
        assert twin.engine is llm.engine
        assert twin.to_dict() == data
    assert shared_fakes.num_made == (0 if is_owned else 1)


def test_dict_holds_nothing_volatile(shared_fakes: type[FakeEngine]) -> None:
    llm = LocalLLM("fake", callback_manager=CallbackManager([]))
    before = llm.to_dict()
    llm.chat(USER)
    assert llm.to_dict() == before
    assert {"model", "temperature", "max_tokens", "engine_kwargs"} <= before.keys()


def test_engine_options_travel_with_the_dict() -> None:
    fake = FakeEngine("fake", max_model_len=512, max_num_seqs=7)
    data = LocalLLM(engine=fake).to_dict()
    assert data["model"] == "fake"
    assert data["engine_kwargs"] == {"max_model_len": 512, "max_num_seqs": 7}
    fake.close()


def test_a_pickle_from_another_process_names_the_problem(fake: FakeEngine) -> None:
    code = """
        import pickle, sys
        from llm_connectors.llama_index import LocalLLM
        sys.stdout.buffer.write(pickle.dumps(LocalLLM("fake", temperature=0.7)))
    """
    pickled = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True
    ).stdout
    llm = pickle.loads(pickled)
    assert llm.temperature == 0.7
    for other in (llm, copy.deepcopy(llm), pickle.loads(pickle.dumps(llm))):
        with pytest.raises(ForeignProcessError, match="pickled in process"):
            other.chat(USER)
        with pytest.raises(ForeignProcessError):
            asyncio.run(other.achat(USER))
    assert not issubclass(ForeignProcessError, ValueError | TypeError | RuntimeError)


def test_a_pipeline_with_processes_fails_instead_of_loading_more_engines(
    tmp_path: Path, tiny_llama: Path
) -> None:
    """`num_workers` of a pipeline pickles the model into spawned processes; it must not hang."""
    script = tmp_path / "pipeline.py"
    script.write_text(
        textwrap.dedent(
            f"""
            from llama_index.core.extractors import KeywordExtractor
            from llama_index.core.ingestion import IngestionPipeline
            from llama_index.core.schema import TextNode
            from llm_connectors.llama_index import ForeignProcessError, LocalLLM

            if __name__ == "__main__":
                options = {{"device": "cpu", "num_threads": 1}}
                llm = LocalLLM({str(tiny_llama)!r}, engine_kwargs=options, max_tokens=4)
                pipeline = IngestionPipeline(transformations=[KeywordExtractor(llm=llm)])
                nodes = [TextNode(text="a"), TextNode(text="b")]
                assert len(pipeline.run(nodes=nodes, num_workers=1)) == 2
                try:
                    pipeline.run(nodes=nodes, num_workers=2)
                except ForeignProcessError as error:
                    print(error)
                llm.close()
            """
        )
    )
    source = Path(engine.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert "num_workers of an extractor" in done.stdout, done.stdout + done.stderr


def test_late_config_errors_are_not_value_errors(
    shared_fakes: type[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise engine.ConfigError("max_num_seqs differs")

    monkeypatch.setattr(shared_fakes, "shared", refuse)
    llm = LocalLLM("fake")
    for call in (lambda: llm.chat(USER), lambda: asyncio.run(llm.achat(USER)), llm.load):
        with pytest.raises(ConfigError, match="max_num_seqs") as caught:
            call()
        assert not isinstance(caught.value, ValueError)


def test_of_two_equal_engines_a_dictionary_finds_the_newer() -> None:
    made = [FakeEngine() for _ in range(8)]
    models = [LocalLLM(engine=engine) for engine in made]
    assert LocalLLM.from_dict(models[0].to_dict()).engine is made[-1]
    assert pickle.loads(pickle.dumps(models[-1])).engine is made[-1]
