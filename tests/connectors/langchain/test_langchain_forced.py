"""Calls that must be made and answers that must fit: what the engine is asked, and what comes."""

import dataclasses
import json
import operator
import warnings
from functools import reduce

import pytest
from langchain_calls import VERBS
from langchain_core.exceptions import OutputParserException
from langchain_core.tools import tool
from langchain_fake_engine import FakeEngine
from pydantic import BaseModel
from typing_extensions import TypedDict

from engine import RequestError
from llm_connectors._answer_plan import AnswerPlan
from llm_connectors.langchain import ChatLocal

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pydantic.v1 import BaseModel as BaseModelV1


@tool
def get_weather(city: str) -> str:
    """Weather in a city."""
    return f"fog in {city}"


@tool
def get_time() -> str:
    """The time."""
    return "noon"


class Person(BaseModel):
    """A person."""

    name: str
    age: int


class PersonV1(BaseModelV1):
    """A person."""

    name: str
    age: int


class PersonDict(TypedDict):
    """A person."""

    name: str
    age: int


@dataclasses.dataclass
class PersonData:
    """A person."""

    name: str
    age: int


FUNCTION = {
    "name": "Person",
    "description": "A person.",
    "parameters": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    },
}
SCHEMA = {"title": "Person", "description": "A person.", **FUNCTION["parameters"]}
ADA = '{"name": "Ada", "age": 36}'


@pytest.fixture
def make_chat():
    engines = []

    def make(answer=None, template="<tool_call>", **options):
        engine = FakeEngine(template=template)
        if answer is not None:
            engine.answer_with = lambda prompt: answer
        engines.append(engine)
        return ChatLocal(engine=engine, **options), engine

    yield make
    for engine in engines:
        engine.close()


def prompt_of(engine):
    return "".join(map(chr, engine.requests[-1].ids))


def schema_of(engine):
    return json.loads(engine.requests[-1].params.json_schema)


# ------------------------------------------------------------------ forced calls


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "choice",
    [
        "get_weather",
        {"type": "function", "function": {"name": "get_weather"}},
        {"type": "tool", "name": "get_weather"},
    ],
)
def test_a_call_to_one_tool_is_begun_in_the_prompt(make_chat, verb, choice):
    chat, engine = make_chat('{"city": "Oslo"}')
    options = {"tools": [get_weather, get_time], "tool_choice": choice}
    outcomes = VERBS[verb](chat, "hi", **options)
    if "generate" in verb:
        outcomes = [one[0].message for one in outcomes]
    answer = reduce(operator.add, outcomes) if "stream" in verb else outcomes[0]
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Oslo"})
    assert answer.content == ""
    assert answer.response_metadata["finish_reason"] == "tool_calls"
    assert prompt_of(engine) == 'hi<tool_call>\n{"name": "get_weather", "arguments": '
    assert schema_of(engine)["properties"] == {"city": {"type": "string"}}
    assert schema_of(engine)["additionalProperties"] is False


@pytest.mark.parametrize("choice", ["any", "required", True, {"type": "any"}])
def test_a_call_to_any_tool_is_one_of_them(make_chat, choice):
    chat, engine = make_chat('{"name": "get_time", "arguments": {}}')
    answer = chat.bind_tools([get_weather, get_time], tool_choice=choice).invoke("hi")
    assert [call["name"] for call in answer.tool_calls] == ["get_time"]
    assert prompt_of(engine) == "hi<tool_call>\n"
    names = [one["properties"]["name"]["const"] for one in schema_of(engine)["anyOf"]]
    assert names == ["get_weather", "get_time"]


def test_several_forced_calls_are_a_list(make_chat):
    calls = [{"name": "get_weather", "arguments": {"city": city}} for city in ("Oslo", "Rome")]
    chat, engine = make_chat(json.dumps(calls))
    bound = chat.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=True)
    answer = bound.invoke("hi")
    assert [call["args"]["city"] for call in answer.tool_calls] == ["Oslo", "Rome"]
    assert schema_of(engine)["type"] == "array"
    assert schema_of(engine)["minItems"] == 1


@pytest.mark.parametrize("choice", [None, "auto", False, {"type": "auto"}])
def test_a_call_that_is_free_is_held_to_the_schema_once_begun(make_chat, choice):
    chat, engine = make_chat("No call.")
    bound = chat.bind_tools([get_weather], tool_choice=choice)
    assert bound.invoke("hi").content == "No call."
    assert "[lazy]" in engine.requests[-1].params.grammar
    bound.bind(strict=False).invoke("hi")
    assert engine.requests[-1].params.grammar is None


def test_forced_calls_of_every_family_are_read_back(make_chat):
    outputs = {
        "one": '{"city": "Oslo"}',
        "arguments": '{"name": "get_weather", "arguments": {"city": "Oslo"}}',
        "parameters": '{"name": "get_weather", "parameters": {"city": "Oslo"}}',
    }
    families = ("hermes", "mistral", "granite", "phi4", "json", "deepseek", "harmony")
    for parser in (*families, "llama3_json", "pythonic", "gemma", "qwen_xml"):
        key = "parameters" if parser == "llama3_json" else "arguments"
        has_json = parser not in ("pythonic", "gemma", "qwen_xml")
        for tools, output in (
            ([get_weather], outputs["one"] if has_json else outputs[key]),
            ([get_weather, get_time], outputs[key]),
        ):
            chat, engine = make_chat(output, tool_parser=parser)
            bound = chat.bind_tools(tools, tool_choice="any")
            answers = [bound.invoke("hi"), reduce(operator.add, bound.stream("hi"))]
            for answer in answers:
                found = [(call["name"], call["args"]) for call in answer.tool_calls]
                assert found == [("get_weather", {"city": "Oslo"})], (parser, prompt_of(engine))


def test_a_forced_call_that_is_cut_off_is_not_made(make_chat):
    chat, _engine = make_chat('{"city": "Oslo"}')
    bound = chat.bind_tools([get_weather], tool_choice="any")
    for answer in (
        bound.invoke("hi", max_tokens=9),
        reduce(operator.add, bound.stream("hi", max_tokens=9)),
    ):
        assert answer.tool_calls == []
        assert answer.invalid_tool_calls[0]["args"].startswith('{"city": ')
        assert answer.response_metadata["finish_reason"] == "length"


def test_a_constraint_of_the_callers_own_and_a_forced_call_exclude_each_other(make_chat):
    chat, engine = make_chat("x")
    with pytest.raises(RequestError, match=r"regex=… and tool_choice both constrain"):
        chat.bind_tools([get_weather], tool_choice="any", regex="a").invoke("hi")
    with pytest.raises(RequestError, match=r"choice=… and response_format both constrain"):
        chat.invoke("hi", choice=["a"], response_format={"type": "json_object"})
    chat.bind_tools([get_weather], regex="a+").invoke("hi")
    assert engine.requests[-1].params.regex == "a+"


# ------------------------------------------------------------------ calls or the final answer


def test_tools_beside_a_format_give_either(make_chat):
    chat, engine = make_chat(ADA)
    bound = chat.bind_tools([get_weather], response_format=Person)
    answer = bound.invoke("hi")
    assert (answer.content, answer.tool_calls) == (ADA, [])
    grammar = engine.requests[-1].params.grammar
    assert '"get_weather"' in grammar
    assert '"age"' in grammar
    engine.answer_with = lambda prompt: (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    )
    assert bound.invoke("hi").tool_calls[0]["args"] == {"city": "Oslo"}


def test_a_family_without_json_calls_gives_either_as_json(make_chat):
    chat, engine = make_chat('{"name": "get_weather", "arguments": {"city": "Oslo"}}')
    bound = chat.bind_tools([get_weather], response_format=Person, tool_parser="gemma")
    assert bound.invoke("hi").tool_calls[0]["args"] == {"city": "Oslo"}
    engine.answer_with = lambda prompt: ADA
    assert bound.invoke("hi").content == ADA


# ------------------------------------------------------------------ structured output


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (Person, Person(name="Ada", age=36)),
        (PersonV1, PersonV1(name="Ada", age=36)),
        (PersonDict, {"name": "Ada", "age": 36}),
        (PersonData, PersonData("Ada", 36)),
        (SCHEMA, {"name": "Ada", "age": 36}),
        (FUNCTION, {"name": "Ada", "age": 36}),
        ({"type": "function", "function": FUNCTION}, {"name": "Ada", "age": 36}),
    ],
    ids=["pydantic", "pydantic v1", "typeddict", "dataclass", "schema", "function", "tool"],
)
def test_structured_output(make_chat, schema, expected, method):
    chat, engine = make_chat(ADA)
    model = chat.with_structured_output(schema, method=method)
    assert model.invoke("hi") == expected
    assert set(schema_of(engine)["properties"]) == {"name", "age"}
    assert list(model.stream("hi"))[-1] == expected
    assert model.batch(["a", "b"]) == [expected, expected]
    assert engine.hand_overs[-1] == 2


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_raw_output_keeps_lists_together(make_chat, method):
    chat, engine = make_chat(ADA)
    model = chat.with_structured_output(Person, method=method, include_raw=True)
    results = model.batch(["a", "b", "c"])
    assert engine.hand_overs[-1] == 3
    assert [one["parsed"] for one in results] == [Person(name="Ada", age=36)] * 3
    assert all(one["parsing_error"] is None for one in results)
    assert results[0]["raw"].usage_metadata
    (single,) = [model.invoke("a")]
    assert single["parsed"] == Person(name="Ada", age=36)
    streamed = reduce(operator.add, model.stream("a"))
    assert streamed["parsed"] == Person(name="Ada", age=36)


def test_raw_output_keeps_what_cannot_be_parsed(make_chat):
    chat, engine = make_chat(ADA)
    model = chat.with_structured_output(Person, include_raw=True, max_tokens=5)
    result = model.invoke("hi")
    assert result["parsed"] is None
    assert isinstance(result["parsing_error"], OutputParserException)
    assert result["raw"].content == ADA[:5]
    assert engine.requests[-1].params.max_tokens == 5
    broken = model.batch(["hi", "REFUSE"], return_exceptions=True)
    assert isinstance(broken[1], RequestError)
    assert broken[0]["raw"].content == ADA[:5]


async def test_raw_output_of_async_calls(make_chat):
    chat, engine = make_chat(ADA)
    model = chat.with_structured_output(Person, include_raw=True)
    assert (await model.ainvoke("a"))["parsed"] == Person(name="Ada", age=36)
    results = await model.abatch(["a", "b"])
    assert [one["parsed"].age for one in results] == [36, 36]
    assert engine.hand_overs[-1] == 2
    pieces = [piece async for piece in model.astream("a")]
    assert len(pieces) > 1
    assert reduce(operator.add, pieces)["parsed"] == Person(name="Ada", age=36)


def test_json_mode_without_a_schema_is_any_object(make_chat):
    chat, engine = make_chat('{"a": [1]}')
    assert chat.with_structured_output(None, method="json_mode").invoke("hi") == {"a": [1]}
    assert schema_of(engine) == {"type": "object"}


def test_schemas_are_traced(make_chat):
    chat, _engine = make_chat(ADA)
    bound = chat.with_structured_output(Person).first
    traced = bound.kwargs["ls_structured_output_format"]
    assert traced == {"kwargs": {"method": "json_schema", "strict": None}, "schema": Person}


@pytest.mark.parametrize(
    ("schema", "options", "message"),
    [
        (Person, {"method": "xml"}, "method='xml' is unknown"),
        (None, {}, "needs a schema"),
        ("Person", {}, "pass a class or a JSON schema"),
        ({"type": "object"}, {}, "cannot be described"),
        (Person, {"strict": "yes"}, "strict='yes'"),
    ],
)
def test_bad_structured_output_is_refused(make_chat, schema, options, message):
    chat, _engine = make_chat()
    with pytest.raises(RequestError, match=message):
        chat.with_structured_output(schema, **options).invoke("hi")


@pytest.mark.parametrize(
    ("wanted", "schema"),
    [
        ({"type": "json_schema", "json_schema": {"name": "P", "schema": SCHEMA}}, SCHEMA),
        ({"type": "json_schema", "schema": SCHEMA}, SCHEMA),
        (SCHEMA, SCHEMA),
        ({"type": "json_object"}, {"type": "object"}),
        (Person, SCHEMA),
    ],
)
def test_formats_of_a_call(make_chat, wanted, schema):
    chat, engine = make_chat(ADA)
    chat.invoke("hi", response_format=wanted)
    assert schema_of(engine).get("properties", {}).keys() == schema.get("properties", {}).keys()
    chat.invoke("hi", response_format={"type": "text"})
    assert engine.requests[-1].params.json_schema is None


@pytest.mark.parametrize(
    "bad", [7, {"type": "json_schema"}, {"type": "json_schema", "json_schema": 3}]
)
def test_bad_formats_are_refused(make_chat, bad):
    chat, _engine = make_chat()
    with pytest.raises(RequestError, match=r"response_format|cannot be described"):
        chat.invoke("hi", response_format=bad)


# ------------------------------------------------------------------ with reasoning


def test_json_may_follow_reasoning_and_is_never_mixed_with_it(make_chat):
    chat, engine = make_chat(f"<think>hm {{</think>\n{ADA}", template="<think><tool_call>")
    answer = chat.invoke("hi", response_format=Person)
    assert (answer.content, answer.additional_kwargs["reasoning_content"]) == (ADA, "hm {")
    assert "thought[lazy]" in engine.requests[-1].params.grammar
    assert chat.with_structured_output(Person).invoke("hi") == Person(name="Ada", age=36)


def test_without_reasoning_the_answer_begins_with_the_json(make_chat):
    chat, engine = make_chat(ADA, template="<think><tool_call>", reasoning=False)
    assert chat.with_structured_output(Person).invoke("hi").age == 36
    assert prompt_of(engine) == "hi<think>\n\n</think>\n\n"
    assert set(schema_of(engine)["properties"]) == {"name", "age"}


def test_a_forced_call_ends_the_reasoning_unless_it_is_asked_for(make_chat):
    chat, engine = make_chat('{"city": "Oslo"}', template="<think><tool_call>")
    bound = chat.bind_tools([get_weather], tool_choice="any")
    assert bound.invoke("hi").tool_calls[0]["args"] == {"city": "Oslo"}
    assert prompt_of(engine).startswith("hi<think>\n\n</think>\n\n<tool_call>")
    call = '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>'
    engine.answer_with = lambda prompt: f"<think>hm</think>{call}"
    answer = bound.bind(reasoning=True).invoke("hi")
    assert answer.tool_calls[0]["args"] == {"city": "Rome"}
    assert answer.additional_kwargs["reasoning_content"] == "hm"
    assert prompt_of(engine) == "hi"


# ------------------------------------------------------------------ schemas of several tools


def test_references_of_each_tool_lead_to_its_own_definitions(make_chat):
    def described(name, kind):
        return {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"at": {"$ref": "#/$defs/Place"}},
                "$defs": {"Place": {"type": kind}},
            },
        }

    chat, engine = make_chat('{"name": "b", "arguments": {"at": 1}}')
    tools = [described("a", "string"), described("b", "integer")]
    chat.bind_tools(tools, tool_choice="any").invoke("hi")
    schema = schema_of(engine)
    kinds = []
    for one in schema["anyOf"]:
        name = one["properties"]["arguments"]["$ref"].removeprefix("#/$defs/")
        place = schema["$defs"][name]["properties"]["at"]["$ref"]
        assert place == f"#/$defs/{name}/$defs/Place"
        kinds.append(schema["$defs"][name]["$defs"]["Place"]["type"])
    assert kinds == ["string", "integer"]


def test_objects_are_closed_unless_they_are_put_together_from_several(make_chat):
    nested = {"type": "object", "properties": {"b": {"type": "integer"}}}
    chat, engine = make_chat("{}")
    chat.invoke("hi", response_format={"title": "T", "type": "object", "properties": {"a": nested}})
    schema = schema_of(engine)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["a"]["additionalProperties"] is False
    composed = {"title": "T", "type": "object", "allOf": [nested, nested]}
    chat.invoke("hi", response_format={"properties": {}, **composed})
    assert "additionalProperties" not in schema_of(engine)


def test_thousands_of_values_are_no_problem(make_chat):
    values = [f"value {index}" for index in range(5000)]
    given = {
        "name": "pick",
        "parameters": {"type": "object", "properties": {"one": {"enum": values}}},
    }
    chat, engine = make_chat('{"one": "value 7"}')
    answer = chat.bind_tools([given], tool_choice="any").invoke("hi")
    assert answer.tool_calls[0]["args"] == {"one": "value 7"}
    assert len(schema_of(engine)["properties"]["one"]["enum"]) == 5000


def test_plans_are_for_one_engine(make_chat):
    chat, engine = make_chat("x")
    options = chat._call_options(None, {"tools": [get_weather]})
    assert isinstance(chat._plan(engine, options), AnswerPlan)
