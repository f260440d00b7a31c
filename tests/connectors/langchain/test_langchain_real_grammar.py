"""Tools and schemas on a real engine with random weights: markup that is control tokens, limits."""

import json

import pytest
import tiny_checkpoints
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel, Field

from engine import ConstraintError, Engine
from llm_connectors.langchain import ChatLocal
from llm_connectors.langchain.errors import ConstraintError as OurConstraintError

MARKS = ["<|tool_call|>", "<think>", "</think>"]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<|tool_call|>{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{# <think> #}"
)


@tool
def get_weather(city: str) -> str:
    """Weather."""
    return city


@tool
def get_time() -> str:
    """Time."""
    return "noon"


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=150)


@pytest.fixture(scope="module", params=["thread", "process"])
def engine(request, tmp_path_factory):
    """Granite's way of calling, with marks that are control tokens, and a reasoning block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_checkpoints, "SPECIALS", [*tiny_checkpoints.SPECIALS, *MARKS])
        patch.setattr(tiny_checkpoints, "CHAT_TEMPLATE", TEMPLATE)
        folder = tiny_checkpoints.write_tiny_llama(
            tmp_path_factory.mktemp("tiny"), max_position_embeddings=4096
        )
    made = Engine(
        str(folder),
        device="cpu",
        num_threads=1,
        max_num_seqs=16,
        max_model_len=2048,
        placement=request.param,
    )
    yield made
    made.close()


@pytest.fixture
def chat(engine):
    return ChatLocal(engine=engine, max_tokens=60, seed=3)


def test_a_forced_call_begins_with_the_control_token(chat, engine):
    bound = chat.bind_tools([get_weather], tool_choice="any", reasoning=False)
    options = chat._call_options(None, dict(bound.kwargs))
    plan = chat._plan(engine, options)
    (prompt,) = plan.encode([[{"role": "user", "content": "Hi"}]])
    mark = engine.tokenizer.special_tokens["<|tool_call|>"]
    assert mark in prompt[-80:]
    for _ in range(3):
        (call,) = bound.invoke("Hi").tool_calls
        assert set(call["args"]) == {"city"}


def test_any_of_several_tools_and_several_calls(chat):
    bound = chat.bind_tools([get_weather, get_time], tool_choice="any")
    assert len(bound.invoke("Hi", max_tokens=200).tool_calls) == 1
    many = bound.bind(parallel_tool_calls=True).batch(["a", "b"], max_tokens=300)
    assert all(answer.tool_calls for answer in many)
    assert all(answer.invalid_tool_calls == [] for answer in many)


def test_free_text_may_use_every_mark_and_calls_fit(chat):
    """Sampled at random, with the marks made likely: whatever call begins is whole."""
    tokens = chat._engine().tokenizer.special_tokens
    bias = {tokens[mark]: 3.0 for mark in ("<|tool_call|>", "<think>")}
    bound = chat.bind_tools([get_weather, get_time], logit_bias=bias, reasoning_parser="none")
    seen = 0
    for seed in range(12):
        answer = bound.invoke("Hi", seed=seed, max_tokens=120)
        seen += len(answer.tool_calls)
        assert answer.invalid_tool_calls == []
        assert "<|tool_call|>" not in answer.content
    assert seen > 0


def test_tools_beside_a_schema(chat):
    bound = chat.bind_tools([get_weather], response_format=Person, reasoning=False)
    for seed in range(6):
        answer = bound.invoke("Hi", seed=seed, max_tokens=200)
        if not answer.tool_calls:
            Person.model_validate_json(answer.content)


def test_reasoning_then_json_within_any_budget(chat):
    model = chat.with_structured_output(Person, include_raw=True)
    for max_tokens in (40, 60, 120):
        results = model.batch([f"Hi {seed}" for seed in range(4)], max_tokens=max_tokens)
        assert [one["parsing_error"] for one in results] == [None] * 4
        assert all(isinstance(one["parsed"], Person) for one in results)


def test_schemas_that_cannot_be_enforced_name_the_place(chat):
    bad = {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "array", "uniqueItems": True}},
        },
    }
    for options in ({"tool_choice": "any"}, {}):
        with pytest.raises(OurConstraintError, match="uniqueItems") as caught:
            chat.bind_tools([bad], **options).invoke("Hi")
        assert isinstance(caught.value, ConstraintError)
    assert isinstance(chat.bind_tools([bad], strict=False).invoke("Hi"), AIMessage)
    batch = chat.bind_tools([bad]).batch(["Hi", "Ho"], return_exceptions=True)
    assert all(isinstance(one, OurConstraintError) for one in batch)


def test_recursive_schemas_and_thousands_of_values(chat):
    tree = {
        "name": "tree",
        "parameters": {
            "type": "object",
            "properties": {"root": {"$ref": "#/$defs/Node"}},
            "required": ["root"],
            "$defs": {
                "Node": {
                    "type": "object",
                    "properties": {
                        "value": {"type": "boolean"},
                        "child": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
                    },
                    "required": ["value"],
                }
            },
        },
    }
    values = [f"value {index}" for index in range(3000)]
    pick = {
        "title": "Pick",
        "type": "object",
        "properties": {"one": {"enum": values}},
        "required": ["one"],
    }
    answer = chat.bind_tools([tree], tool_choice="any").invoke("Hi", max_tokens=200)
    assert isinstance(answer.tool_calls[0]["args"]["root"]["value"], bool)
    assert chat.with_structured_output(pick).invoke("Hi")["one"] in values


def test_a_conversation_with_results_goes_on(chat):
    call = {"name": "get_weather", "args": {"city": "Oslo"}, "id": "c1"}
    messages = [
        HumanMessage("Hi"),
        AIMessage("", tool_calls=[call]),
        ToolMessage(json.dumps({"sky": "grey"}), tool_call_id="c1"),
    ]
    assert chat.bind_tools([get_weather]).invoke(messages).usage_metadata["output_tokens"] > 0
