"""Engines: loaded late, shared, given back; objects copied, pickled and traced; errors mapped."""

import asyncio
import copy
import gc
import pickle
import threading

import pytest
from langchain_core import exceptions as core
from langchain_core.load import dumpd
from langchain_fake_engine import FakeEngine
from pydantic import ValidationError

import engine
from engine import EngineConfig
from llm_connectors.langchain import ChatLocal, LocalLLM, errors
from llm_connectors.langchain.errors import LANGCHAIN_ERRORS


def references(shared):
    return [count for _engine, count in shared.references.values()]


def test_the_model_is_loaded_at_the_first_call_and_shared(shared):
    chat, llm = ChatLocal(model="m"), LocalLLM(model="m")
    assert shared.loads == []
    assert chat.invoke("ab").content == "ba"
    assert llm.batch(["ab", "cd"]) == ["ba", "dc"]
    assert asyncio.run(chat.ainvoke("ab")).content == "ba"
    assert len(shared.loads) == 1
    assert references(shared) == [1], "all objects of one config share one reference"


def test_load_and_aload(shared, model_class):
    assert model_class(model="m").load()._lease.is_loaded
    model = model_class(model="m2", engine_kwargs={"device": "cpu"})
    assert asyncio.run(model.aload()) is model
    assert shared.loads == [EngineConfig(model="m"), EngineConfig(model="m2", device="cpu")]


def test_threads_that_want_one_model_load_it_once(shared):
    shared.load_s = 0.05
    models = [ChatLocal(model="m") for _ in range(8)]
    threads = [threading.Thread(target=model.load) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(shared.loads) == 1
    assert references(shared) == [1], "the references taken twice were given back"


def test_close_frees_when_the_last_user_closes(shared):
    first, second, never_used = (ChatLocal(model="m") for _ in range(3))
    first.load()
    second.load()
    first.close()
    assert references(shared) == [1]
    assert second.invoke("ab").content == "ba"
    second.close()
    assert references(shared) == [0]
    second.close()
    never_used.close()
    assert references(shared) == [0]
    assert first.invoke("ab").content == "ba", "a later call loads again"
    assert len(shared.loads) == 2


def test_objects_that_are_gone_do_not_hold_the_engine_nor_drop_it(shared):
    """LangChain makes an object per configured call; the engine must outlive each of them."""
    keeper = ChatLocal(model="m")
    for _ in range(3):
        ChatLocal(model="m").invoke("ab")
        gc.collect()
    assert len(shared.loads) == 1
    keeper.close()
    assert references(shared) == [0]


def test_a_closed_or_dead_engine_is_replaced(shared):
    chat = ChatLocal(model="m").load()
    chat._engine().is_closed = True
    assert chat.invoke("ab").content == "ba"
    assert len(shared.loads) == 2


def test_an_engine_passed_in_is_its_owners(fake_engine, model_class):
    model = model_class(engine=fake_engine)
    model.invoke("ab")
    model.close()
    assert fake_engine.num_closes == 0
    model.invoke("ab")
    fake_engine.close()
    with pytest.raises(errors.EngineClosedError):
        model.invoke("ab")


@pytest.mark.parametrize(
    "copier",
    [
        copy.copy,
        copy.deepcopy,
        lambda model: model.model_copy(),
        lambda model: model.model_copy(deep=True),
        lambda model: pickle.loads(pickle.dumps(model)),
    ],
    ids=["copy", "deepcopy", "model_copy", "model_copy_deep", "pickle"],
)
def test_copies_find_the_same_shared_engine(shared, model_class, copier):
    model = model_class(model="m", engine_kwargs={"device": "cpu"}, temperature=0.5, stop=["x"])
    unloaded = copier(model)
    model.load()
    loaded = copier(model)
    for one in (unloaded, loaded):
        assert one._identifying_params == model._identifying_params
        one.invoke("ab")
    assert len(shared.loads) == 1


def test_copies_of_an_object_with_an_engine_passed_in(fake_engine, model_class):
    model = model_class(engine=fake_engine, temperature=0.5)
    for one in (copy.copy(model), copy.deepcopy(model), model.model_copy(deep=True)):
        assert one.engine is fake_engine
        assert one.temperature == 0.5
        one.invoke("ab")
    assert len(fake_engine.requests) == 3


def test_a_pickle_carries_the_engines_name_and_options(shared, model_class):
    owned = FakeEngine("m", device="cpu", max_num_seqs=8)
    model = pickle.loads(pickle.dumps(model_class(engine=owned, temperature=0.5)))
    assert model.engine is None
    assert (model.model, model.engine_kwargs) == ("m", {"device": "cpu", "max_num_seqs": 8})
    assert model.temperature == 0.5
    model.load()
    assert shared.loads == [EngineConfig(model="m", device="cpu", max_num_seqs=8)]
    owned.close()


def test_profile_knows_the_context_once_it_is_known(shared):
    chat = ChatLocal(model="m")
    assert "max_input_tokens" not in chat.profile
    assert chat.profile["tool_calling"] is True
    chat.load()
    assert chat.profile["max_input_tokens"] == 10_000
    assert ChatLocal(engine=chat._engine()).profile["max_input_tokens"] == 10_000
    own = ChatLocal(model="m", profile={"max_input_tokens": 5}).load()
    assert own.profile == {"max_input_tokens": 5}


def test_identity_for_caches_and_traces(fake_engine, model_class):
    model = model_class(engine=fake_engine, temperature=0.5, stop=["x"], max_tokens=7)
    params = model._identifying_params
    assert params["model"] == "fake-model"
    assert (params["temperature"], params["max_tokens"]) == (0.5, 7)
    assert params["constructor_stop"] == ["x"]
    traced = model._get_ls_params(stop=["y"], temperature=0.1, max_tokens=3, model="other")
    assert traced == {
        "ls_provider": "llm-connectors",
        "ls_model_type": "chat" if model_class is ChatLocal else "llm",
        "ls_model_name": "other",
        "ls_temperature": 0.1,
        "ls_max_tokens": 3,
        "ls_stop": ["x", "y"],
    }


def test_two_engine_options_are_two_cache_entries():
    one = ChatLocal(model="m", engine_kwargs={"revision": "a"})
    two = ChatLocal(model="m", engine_kwargs={"revision": "b"})
    assert one._get_llm_string() != two._get_llm_string()


def test_not_serializable_and_nothing_secret_shown(fake_engine, model_class):
    model = model_class(engine=fake_engine, api_key="secret")
    assert not model.is_lc_serializable()
    assert dumpd(model)["type"] == "not_implemented"
    assert "secret" not in str(dumpd(model))
    assert "engine" not in model.model_dump()


# ---------------------------------------------------------------- errors


CORE = {
    "EngineError": core.ModelError,
    "ConfigError": core.ModelInvalidRequestError,
    "ModelNotFoundError": core.ModelNotFoundError,
    "UnsupportedModelError": core.ModelNotFoundError,
    "CheckpointError": core.ModelNotFoundError,
    "RequestError": core.ModelInvalidRequestError,
    "ContextOverflowError": core.ContextOverflowError,
    "ConstraintError": core.ModelInvalidRequestError,
    "CapacityError": core.ModelAPIError,
    "RequestTimeoutError": core.ModelTimeoutError,
    "RequestAbortedError": core.ModelError,
    "StepError": core.ModelAPIError,
    "EngineDeadError": core.ModelAPIError,
    "EngineClosedError": core.ModelAPIError,
}
RETRYABLE = {"RequestTimeoutError", "StepError"}


def test_every_engine_error_has_an_entry():
    found = {
        name
        for name in dir(engine)
        if isinstance(getattr(engine, name), type)
        and issubclass(getattr(engine, name), engine.EngineError)
    }
    assert found == set(CORE)


@pytest.mark.parametrize("name", CORE)
def test_errors_are_the_engines_and_langchains(name):
    cause = RuntimeError("why")
    original = getattr(engine, name)(
        "what",
    )
    original.add_note("a note")
    original.__cause__ = cause
    converted = LANGCHAIN_ERRORS.convert(original)
    assert type(converted) is getattr(errors, name)
    assert isinstance(converted, getattr(engine, name))
    assert isinstance(converted, CORE[name])
    assert converted.is_retryable is (name in RETRYABLE)
    assert str(converted) == "what"
    assert converted.__cause__ is cause
    assert converted.__notes__ == ["a note"]
    assert LANGCHAIN_ERRORS.convert(converted) is converted
    assert converted is not original


@pytest.mark.parametrize("verb", ["invoke", "ainvoke", "stream", "astream", "batch", "load"])
def test_load_errors_reach_the_caller(shared, model_class, verb):
    from langchain_calls import VERBS

    shared.error = engine.ModelNotFoundError("'m' leads nowhere.")
    model = model_class(model="m")
    with pytest.raises(core.ModelNotFoundError, match="leads nowhere") as caught:
        model.load() if verb == "load" else VERBS[verb](model, "ab")
    assert isinstance(caught.value, engine.ModelNotFoundError)


@pytest.mark.parametrize("verb", ["invoke", "ainvoke", "stream", "astream", "batch", "abatch"])
def test_context_overflow_is_both(fake_engine, model_class, verb):
    from langchain_calls import VERBS

    with pytest.raises(core.ContextOverflowError) as caught:
        VERBS[verb](model_class(engine=fake_engine), "x" * 20_000)
    assert isinstance(caught.value, engine.ContextOverflowError)
    assert isinstance(caught.value, ValueError)


def test_retries_and_fallbacks_see_the_errors(fake_engine, model_class):
    fallback = model_class(engine=fake_engine)
    long_or_short = model_class(engine=fake_engine).with_fallbacks([fallback])
    with pytest.raises(core.ContextOverflowError):
        long_or_short.invoke("x" * 20_000)
    retried = model_class(engine=fake_engine).with_retry(
        retry_if_exception_type=(core.ModelInvalidRequestError,),
        stop_after_attempt=3,
        wait_exponential_jitter=False,
    )
    with pytest.raises(errors.RequestError):
        retried.invoke("FAIL")
    assert len(fake_engine.requests) == 3


def test_constructors_raise_validation_errors(model_class):
    with pytest.raises(ValidationError, match="num_threads"):
        model_class(model="m", engine_kwargs={"num_threads": 0})
