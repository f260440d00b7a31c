"""Options: every one reaches the engine by every way, and no name is swallowed."""

import dataclasses

import pytest
from langchain_calls import VERBS
from langchain_core.runnables import ConfigurableField
from langchain_fake_engine import FakeEngine
from pydantic import ValidationError

from engine import ConfigError, ConstraintError, RequestError, SamplingParams
from llm_connectors._params import ALIASES, DEFAULT_MAX_TOKENS, SAMPLING_NAMES, SamplingFields
from llm_connectors.langchain import ChatLocal, LocalLLM, register_model, unregister_model

# A value of each option that differs from its default.
VALUES = {
    "n": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 7,
    "min_p": 0.1,
    "seed": 11,
    "stop": ["zz"],
    "stop_token_ids": [5],
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "max_tokens": 3,
    "min_tokens": 1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.5,
    "logit_bias": {4: 1.0},
    "bad_words": ["bad"],
    "logprobs": 2,
    "prompt_logprobs": 1,
    "skip_special_tokens": False,
    "json_schema": {"type": "integer"},
    "regex": "a+",
    "choice": ["a", "b"],
    "grammar": 'start: "a"',
    "json_whitespace": "compact",
}
MALFORMED = {"json_schema": "{", "regex": "", "choice": [], "grammar": ""}


def expected(name):
    return getattr(SamplingParams.from_kwargs(**{name: VALUES[name]}), name)


def test_every_engine_option_is_a_field_and_is_tested():
    assert set(SamplingFields.model_fields) == set(SAMPLING_NAMES)
    assert set(SAMPLING_NAMES) == set(SamplingParams.field_names()) | {"top_logprobs"}
    assert set(VALUES) == set(SamplingParams.field_names())
    defaults = {name: getattr(SamplingParams(), name) for name in SamplingParams.field_names()}
    for name, value in VALUES.items():
        assert expected(name) != defaults[name], f"{name}={value} proves nothing"


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", VALUES)
def test_option_of_the_call_reaches_the_engine(model, fake_engine, name, verb):
    if name == "n" and "stream" in verb:
        with pytest.raises(RequestError, match="n=2 answers cannot be streamed"):
            VERBS[verb](model, "ab", n=2)
        return
    VERBS[verb](model, "ab", **{name: VALUES[name]})
    assert [getattr(one.params, name) for one in fake_engine.requests] == (
        [expected(name)] * len(fake_engine.requests)
    )
    assert fake_engine.requests


@pytest.mark.parametrize("how", ["constructor", "bind", "configurable"])
@pytest.mark.parametrize("name", VALUES)
def test_option_of_the_object_reaches_the_engine(model_class, fake_engine, name, how):
    value = VALUES[name]
    if how == "constructor":
        model_class(engine=fake_engine, **{name: value}).invoke("ab")
    elif how == "bind":
        model_class(engine=fake_engine).bind(**{name: value}).invoke("ab")
    else:
        model = model_class(engine=fake_engine).configurable_fields(
            **{name: ConfigurableField(id="option")}
        )
        model.invoke("ab", config={"configurable": {"option": value}})
    assert getattr(fake_engine.requests[0].params, name) == expected(name)


def test_defaults_are_the_engines_but_for_max_tokens(model, fake_engine):
    model.invoke("ab")
    assert fake_engine.requests[0].params == SamplingParams(max_tokens=DEFAULT_MAX_TOKENS)


def test_changing_a_field_changes_the_next_call(model, fake_engine):
    model.invoke("ab")
    model.temperature = 0.25
    model.stop = ["x"]
    model.invoke("ab")
    model.stop.append("y")
    model.invoke("ab")
    assert [one.params.temperature for one in fake_engine.requests] == [1.0, 0.25, 0.25]
    assert [one.params.stop for one in fake_engine.requests] == [None, ("x",), ("x", "y")]


@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("verb", ["invoke", "abatch"])
def test_aliases(model_class, fake_engine, alias, verb):
    name = ALIASES[alias]
    VERBS[verb](model_class(engine=fake_engine), "ab", **{alias: VALUES[name]})
    model_class(engine=fake_engine, **{alias: VALUES[name]}).invoke("ab")
    for request in fake_engine.requests:
        assert getattr(request.params, name) == expected(name)


def test_option_under_two_names(model_class, fake_engine):
    with pytest.raises(ValidationError, match="max_new_tokens"):
        model_class(engine=fake_engine, max_tokens=1, max_new_tokens=2)
    with pytest.raises(RequestError, match="max_new_tokens"):
        model_class(engine=fake_engine).invoke("a", max_new_tokens=1, max_tokens=2)


@pytest.mark.parametrize("verb", VERBS)
def test_unknown_call_option_names_the_nearest(model, fake_engine, verb):
    with pytest.raises(RequestError, match=r"'max_token'.*Did you mean 'max_tokens'"):
        VERBS[verb](model, "ab", max_token=3)
    assert fake_engine.requests == []


def test_unknown_constructor_option_names_the_nearest(model_class):
    with pytest.raises(ValidationError, match=r"'temprature'.*Did you mean 'temperature'"):
        model_class(model="m", temprature=1)
    with pytest.raises(ValidationError, match=r"'devise'.*Did you mean 'device'"):
        model_class(model="m", engine_kwargs={"devise": "cpu"})


@pytest.mark.parametrize(("name", "bad"), [("temperature", -1.0), ("top_p", 0.0), ("n", 0)])
def test_bad_values_raise_at_once(model_class, fake_engine, name, bad):
    with pytest.raises(ValidationError, match=name):
        model_class(engine=fake_engine, **{name: bad})
    with pytest.raises(RequestError, match=name):
        model_class(engine=fake_engine).invoke("a", **{name: bad})


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_constraints_are_refused(model_class, fake_engine, name):
    with pytest.raises(ValidationError, match=name):
        model_class(engine=fake_engine, **{name: MALFORMED[name]})
    with pytest.raises(ConstraintError, match=name):
        model_class(engine=fake_engine).invoke("a", **{name: MALFORMED[name]})


@pytest.mark.parametrize("verb", VERBS)
def test_stop_of_object_and_call_are_merged(model_class, fake_engine, verb):
    model = model_class(engine=fake_engine, stop=["x", "y"])
    VERBS[verb](model, "ab", stop=["y", "z"])
    assert fake_engine.requests[0].params.stop == ("x", "y", "z")


@pytest.mark.parametrize(
    ("given", "number"),
    [
        ({"logprobs": True}, 0),
        ({"logprobs": False}, None),
        ({"logprobs": True, "top_logprobs": 3}, 3),
        ({"top_logprobs": 4}, 4),
        ({"logprobs": 5}, 5),
        ({"logprobs": False, "top_logprobs": 3}, None),
    ],
)
def test_logprobs_in_both_spellings(model_class, fake_engine, given, number):
    model_class(engine=fake_engine, **given).invoke("ab")
    model_class(engine=fake_engine).invoke("ab", **given)
    assert [one.params.logprobs for one in fake_engine.requests] == [number, number]


@pytest.mark.parametrize("verb", VERBS)
def test_priority_and_cache_salt(model_class, fake_engine, verb):
    VERBS[verb](model_class(engine=fake_engine, cache_salt="tenant"), "ab", priority=-2)
    options = fake_engine.requests[0].submit_options
    assert (options["priority"], options["cache_salt"]) == (-2, "tenant")


@pytest.mark.parametrize("verb", VERBS)
def test_parse_special_of_text(fake_engine, verb):
    VERBS[verb](LocalLLM(engine=fake_engine), "ab", parse_special=True)
    assert all(one.submit_options["parse_special"] for one in fake_engine.requests)
    LocalLLM(engine=fake_engine).invoke("ab")
    assert fake_engine.requests[-1].submit_options["parse_special"] is False


@pytest.mark.parametrize("verb", VERBS)
def test_template_of_the_call(fake_engine, verb):
    chat = ChatLocal(engine=fake_engine, chat_template="own")
    VERBS[verb](chat, "ab")
    assert fake_engine.last_render.chat_template == "own"
    VERBS[verb](chat, "ab", chat_template="other", chat_template_kwargs={"think": True})
    assert fake_engine.last_render.chat_template == "other"
    assert fake_engine.last_render.template_kwargs == {"think": True}


def test_names_other_classes_take_are_accepted(model_class):
    model = model_class(
        model_name="m", timeout=60, max_retries=2, api_key="secret", streaming=True, stop=[]
    )
    assert model.model == model.model_name == "m"
    assert "secret" not in repr(model)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["tools", "tool_choice", "response_format"])
def test_text_completion_has_no_tools_and_says_so(llm, verb, name):
    with pytest.raises(RequestError, match=name):
        VERBS[verb](llm, "ab", **{name: ["any"]})


@pytest.mark.parametrize("verb", VERBS)
def test_a_registered_model_answers_the_call_that_names_it(model_class, fake_engine, verb):
    other = FakeEngine("other")
    register_model("small", engine=other)
    try:
        VERBS[verb](model_class(engine=fake_engine), "ab", model_name="small")
    finally:
        unregister_model("small")
        other.close()
    assert other.requests
    assert fake_engine.requests == []


def test_the_answer_names_the_registered_model(chat, llm):
    other = FakeEngine("other")
    register_model("small", engine=other)
    try:
        assert chat.invoke("ab", model="small").response_metadata["model_name"] == "small"
        (chunk, *_rest) = list(chat.stream("a_", model_name="small"))[-1:]
        assert chunk.response_metadata["model_name"] == "small"
        assert llm.generate(["ab"], model="small").llm_output["model_name"] == "small"
        assert chat._get_ls_params(model="small")["ls_model_name"] == "small"
    finally:
        unregister_model("small")
        other.close()


def test_names_are_registered_once():
    register_model("small", "one-model")
    register_model("small", "one-model")
    try:
        with pytest.raises(ConfigError, match=r"'small' is registered already, for 'one-model'"):
            register_model("small", "another-model")
        with pytest.raises(ConfigError, match="non-empty string"):
            register_model("", "one-model")
        with pytest.raises(ConfigError, match="Did you mean 'device'"):
            register_model("bad", "one-model", devise="cpu")
    finally:
        unregister_model("small")
        unregister_model("small")


def test_a_model_that_is_not_registered_is_refused(model):
    model.invoke("a", model=model.model)
    with pytest.raises(RequestError, match="'another' is not registered"):
        model.invoke("a", model="another")


def test_model_and_engine_must_agree(model_class, fake_engine):
    with pytest.raises(ValidationError, match="No model given"):
        model_class()
    with pytest.raises(ValidationError, match="not the model of engine"):
        model_class(model="another", engine=fake_engine)
    with pytest.raises(ValidationError, match="running already"):
        model_class(engine=fake_engine, engine_kwargs={"device": "cpu"})
    assert model_class(engine=fake_engine).model == "fake-model"


@pytest.mark.parametrize("name", ["model", "engine", "engine_kwargs"])
def test_the_engine_is_fixed_at_construction(model, name):
    with pytest.raises(ValidationError, match="frozen"):
        setattr(model, name, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("timeout", 5.0),
        ("priority", 3),
        ("cache_salt", "tenant"),
        ("temperature", 0.5),
        ("stop", ["x"]),
        ("stream_usage", False),
        ("chat_template", "{{ messages }}"),
        ("chat_template_kwargs", {"a": 1}),
        ("tool_parser", "hermes"),
        ("reasoning", True),
        ("reasoning_parser", "none"),
    ],
)
def test_options_that_are_kept_follow_every_field(fake_engine, field, value):
    """Options of calls without keywords are made once; a field set later is seen by the next."""
    chat = ChatLocal(engine=fake_engine)
    before = chat._call_options(None, {})
    assert chat._call_options(None, {}) is before
    setattr(chat, field, value)
    fresh = ChatLocal(engine=fake_engine, **{field: value})._call_options(None, {})
    assert chat._call_options(None, {}) == dataclasses.replace(fresh, lease=chat._lease)
    assert chat._call_options(None, {}) != before


def test_options_that_are_kept_see_a_change_inside_a_field(fake_engine):
    chat = ChatLocal(engine=fake_engine, chat_template_kwargs={"a": 1})
    kept = chat._call_options(None, {})
    chat.chat_template_kwargs["a"] = 2
    assert chat._call_options(None, {}) is not kept
    assert chat._call_options(None, {}).answer.template_kwargs == {"a": 2}


def test_a_copy_keeps_no_options_of_another_lease(fake_engine):
    chat = ChatLocal(engine=fake_engine)
    chat._call_options(None, {})
    twin = chat.model_copy(deep=True)
    assert twin._call_options(None, {}).lease is twin._lease
