"""Forced tool calls and the structured methods, by constrained decoding. Tiny and demo model."""

from __future__ import annotations

import asyncio
import enum
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from llama_index.core import Document, SummaryIndex
from llama_index.core.agent.workflow import (
    AgentWorkflow,
    FunctionAgent,
    ReActAgent,
    ToolCallResult,
)
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from llama_index_fake_engine import FakeEngine
from pydantic import BaseModel, ConfigDict, Field, field_validator
from tiny_checkpoints import write_tiny_llama

from engine import Engine
from llm_connectors.llama_index import (
    ConstraintError,
    LocalLLM,
    RequestError,
    StructuredOutputError,
    configure_settings,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LlamaIndex's own


class Kind(enum.Enum):
    TOWN = "town"
    CAPITAL = "capital"


class Street(BaseModel):
    name: str = Field(max_length=12)
    length_km: float | None = None


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=12)
    kind: Kind
    streets: list[Street] = Field(min_length=1, max_length=2)
    mayor: str | None = Field(default=None, max_length=8)
    size: Literal["small", "large"] = "small"


class Person(BaseModel):
    """A person."""

    model_config = ConfigDict(extra="forbid")
    age: int = Field(ge=0, le=150)
    is_adult: bool


METHODS = ("structured_predict", "astructured_predict", "stream", "astream")
PROMPT = PromptTemplate("Describe {thing}.")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = write_tiny_llama(tmp_path_factory.mktemp("wide"), max_position_embeddings=8192)
    with Engine(str(folder), device="cpu", num_threads=1, max_num_seqs=32) as engine:
        yield engine
        assert engine.stats().kv_blocks_used == 0


@pytest.fixture
def llm(tiny: Engine) -> LocalLLM:
    """A model that writes noise unless it is held to something."""
    return LocalLLM(engine=tiny, max_tokens=400, temperature=1.0, seed=3)


def objects(llm: LocalLLM, method: str, cls: type[BaseModel], **kwargs: Any) -> list[Any]:
    """All objects that one of the four methods gives."""
    arguments: Any = {"thing": "it", **kwargs}
    if method == "structured_predict":
        return [llm.structured_predict(cls, PROMPT, **arguments)]
    if method == "stream":
        return list(llm.stream_structured_predict(cls, PROMPT, **arguments))

    async def main() -> list[Any]:
        if method == "astructured_predict":
            return [await llm.astructured_predict(cls, PROMPT, **arguments)]
        stream = await llm.astream_structured_predict(cls, PROMPT, **arguments)
        return [one async for one in stream]

    return asyncio.run(main())


# ---- the four methods


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["schema", "tool"])
@pytest.mark.parametrize("cls", [City, Person])
def test_objects_are_always_valid(
    llm: LocalLLM, method: str, mode: Any, cls: type[BaseModel]
) -> None:
    for seed in range(3):
        found = objects(llm.with_options(structured_mode=mode, seed=seed), method, cls)
        assert type(found[-1]) is cls
        if "stream" in method:
            filled = [len(one.model_dump(exclude_none=True)) for one in found[:-1]]
            assert filled == sorted(filled)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["schema", "tool", "text"])
def test_system_prompt_and_options_reach_every_method(method: str, mode: Any) -> None:
    answer = '{"age": 7, "is_adult": false}'
    fake = FakeEngine(answer=lambda _prompt, _params: answer, step_s=0.01)
    llm = LocalLLM(engine=fake, system_prompt="Be quick.", structured_mode=mode)
    found = objects(llm, method, Person, llm_kwargs={"temperature": 0.5})
    assert found[-1] == Person(age=7, is_adult=False)
    if "stream" in method and mode != "text":  # LlamaIndex's own repair cannot read that
        assert any(one.model_dump() == {"age": 7, "is_adult": None} for one in found)
    request = fake.requests[-1]
    prompt = fake.detokenize(request.prompt_ids)
    assert prompt.count("Be quick.") == 1
    assert "is_adult" in prompt
    assert request.params.temperature == 0.5
    assert (request.params.json_schema is None) == (mode == "text")
    assert len(fake.requests) == 1
    fake.close()


def test_two_classes_share_one_template_at_once(llm: LocalLLM) -> None:
    async def main(mode: Any) -> list[Any]:
        one = llm.with_options(structured_mode=mode)
        asked = [
            one.astructured_predict(cls, PROMPT, thing="it") for cls in (City, Person) for _ in "12"
        ]
        return await asyncio.gather(*asked)

    for mode in ("schema", "tool"):
        kinds = [type(one) for one in asyncio.run(main(mode))]
        assert kinds == [City, City, Person, Person]
    fake = FakeEngine(
        answer=lambda prompt, _params: (
            '{"age": 1, "is_adult": true}' if "is_adult" in prompt else '{"name": "A"}'
        )
    )

    async def texts() -> list[Any]:
        one = LocalLLM(engine=fake, structured_mode="text")
        return await asyncio.gather(
            *(one.astructured_predict(cls, PROMPT, thing="it") for cls in (Street, Person) * 4)
        )

    assert [type(one) for one in asyncio.run(texts())] == [Street, Person] * 4
    assert PROMPT.output_parser is None
    fake.close()


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    inner: Street


@pytest.mark.parametrize("mode", ["schema", "tool"])
def test_the_model_cannot_invent_properties(mode: Any) -> None:
    fake = FakeEngine(answer=lambda _prompt, _params: '{"name": "A", "inner": {"name": "B"}}')
    llm = LocalLLM(engine=fake, structured_mode=mode)
    llm.structured_predict(Street, PROMPT, thing="it")
    assert fake.requests[-1].params.json_schema.count('"additionalProperties": false') == 1
    llm.structured_predict(Open, PROMPT, thing="it")
    schema = fake.requests[-1].params.json_schema
    assert schema.count('"additionalProperties": false') == 1
    assert schema.count('"additionalProperties": true') == 1
    fake.close()


def test_as_structured_llm(llm: LocalLLM) -> None:
    structured = llm.as_structured_llm(Person)
    messages = [ChatMessage("Be brief {really}.", role=MessageRole.SYSTEM), ChatMessage("Who?")]
    response = structured.chat(messages)
    assert isinstance(response.raw, Person)
    assert Person.model_validate_json(response.message.content) == response.raw
    last = list(structured.stream_chat(messages))[-1]
    assert isinstance(last.raw, Person)
    assert isinstance(asyncio.run(structured.acomplete("Who?")).raw, Person)


def test_base_models_answer_with_objects_too(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path, max_position_embeddings=4096)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with Engine(str(folder), device="cpu", num_threads=1) as engine:
        llm = LocalLLM(engine=engine, max_tokens=80, system_prompt="Be quick.")
        assert llm.metadata.is_chat_model is False
        for method in METHODS:
            assert type(objects(llm, method, Person)[-1]) is Person
        with pytest.raises(RequestError, match="schema"):
            objects(llm.with_options(structured_mode="tool"), "structured_predict", Person)


def test_response_format_of_a_chat(llm: LocalLLM) -> None:
    schema = Person.model_json_schema()
    wanted = {"type": "json_schema", "json_schema": {"name": "Person", "schema": schema}}
    text = llm.chat([ChatMessage("Who?")], response_format=wanted).message.content
    Person.model_validate_json(text)
    assert isinstance(json.loads(llm.complete("Who?", response_format=schema).text), dict)


def test_program_mode_is_respected(llm: LocalLLM) -> None:
    other = llm.with_options(
        pydantic_program_mode=PydanticProgramMode.FUNCTION, tool_parser="hermes"
    )
    assert type(objects(other, "structured_predict", Person)[-1]) is Person


def test_function_calling_program_streams_objects() -> None:
    """`process_streaming_objects` reads `additional_kwargs["tool_calls"]` alone."""
    call = '<tool_call>{"name": "Person", "arguments": {"age": 7, "is_adult": true}}</tool_call>'
    fake = FakeEngine(answer=lambda _prompt, _params: call, step_s=0.005)
    program = FunctionCallingProgram.from_defaults(
        output_cls=Person,
        prompt_template_str="Who?",
        llm=LocalLLM(engine=fake, tool_parser="hermes"),
    )
    found = list(program.stream_call())
    assert found[-1] == Person(age=7, is_adult=True)
    assert any(one.model_dump() == {"age": 7, "is_adult": None} for one in found)
    fake.close()


# ---- what goes wrong


class Picky(BaseModel):
    age: int = Field(ge=0, le=9)

    @field_validator("age")
    @classmethod
    def refuse(cls, _age: int) -> int:
        raise ValueError("never old enough")


class Node(BaseModel):
    name: str = Field(max_length=4)
    children: list[Node] = Field(max_length=1)


def test_what_a_schema_cannot_say_is_a_typed_error(llm: LocalLLM) -> None:
    for method in METHODS:
        with pytest.raises(StructuredOutputError, match="never old enough") as caught:
            objects(llm, method, Picky)
        assert not isinstance(caught.value, ValueError | TypeError | RuntimeError)


def test_schemas_that_cannot_be_enforced(llm: LocalLLM) -> None:
    class Odd(BaseModel):
        model_config = ConfigDict(json_schema_extra={"not": {"required": ["a"]}})
        a: int

    with pytest.raises(ConstraintError) as caught:
        objects(llm, "structured_predict", Odd)
    assert not isinstance(caught.value, ValueError)
    loop: dict[str, Any] = {"type": "object"}
    loop["properties"] = {"self": loop}
    with pytest.raises(ConstraintError, match="itself"):
        llm.chat([ChatMessage("Who?")], response_format=loop)


def test_recursive_classes(llm: LocalLLM) -> None:
    assert type(objects(llm, "structured_predict", Node)[-1]) is Node


def test_errors_of_structured_answers_are_no_empty_response(llm: LocalLLM) -> None:
    configure_settings(llm, MockEmbedding(embed_dim=2))
    engine = SummaryIndex.from_documents([Document(text="Old.")]).as_query_engine(
        output_cls=Picky, llm=llm
    )
    with pytest.raises(StructuredOutputError):
        engine.query("Who?")


# ---- forced calls


class Place(BaseModel):
    city: Literal["Oslo", "Rome"]
    days: int = 1


def weather(city: str, days: int = 1) -> str:
    """Weather in a city."""
    return f"Fog in {city}."


def clock() -> str:
    """The time."""
    return "Noon."


TOOLS = [FunctionTool.from_defaults(weather, fn_schema=Place), FunctionTool.from_defaults(clock)]
CHATS = ("chat_with_tools", "achat_with_tools", "stream_chat_with_tools", "astream_chat_with_tools")


def last_of(llm: LocalLLM, endpoint: str, **kwargs: Any) -> Any:
    if not endpoint.startswith("a"):
        result = getattr(llm, endpoint)(TOOLS, user_msg="Hi", **kwargs)
        return list(result)[-1] if "stream" in endpoint else result

    async def main() -> Any:
        result = await getattr(llm, endpoint)(TOOLS, user_msg="Hi", **kwargs)
        return [chunk async for chunk in result][-1] if "stream" in endpoint else result

    return asyncio.run(main())


@pytest.mark.parametrize("endpoint", CHATS)
def test_a_required_call_is_made(llm: LocalLLM, endpoint: str) -> None:
    for seed in range(3):
        one = llm.with_options(seed=seed)
        response = last_of(one, endpoint, tool_required=True)
        (call,) = one.get_tool_calls_from_response(response)
        assert call.tool_name in ("weather", "clock")
        assert response.raw["finish_reason"] == "tool_calls"
        response = last_of(one, endpoint, tool_choice="weather")
        (call,) = one.get_tool_calls_from_response(response)
        assert call.tool_name == "weather"
        assert call.tool_kwargs["city"] in ("Oslo", "Rome")
        assert set(call.tool_kwargs) <= {"city", "days"}


def test_several_required_calls(llm: LocalLLM) -> None:
    response = last_of(llm, "chat_with_tools", tool_required=True, allow_parallel_tool_calls=True)
    calls = llm.get_tool_calls_from_response(response)
    assert calls
    assert len({call.tool_id for call in calls}) == len(calls)


@pytest.mark.parametrize("is_async", [False, True])
def test_predict_and_call_calls(llm: LocalLLM, is_async: bool) -> None:
    """Also a model that was trained on no tools; nothing is parsed out of free text."""
    assert llm.metadata.is_function_calling_model is False
    if is_async:
        response = asyncio.run(llm.apredict_and_call(TOOLS, "Hi"))
    else:
        response = llm.predict_and_call(TOOLS, "Hi")
    assert response.sources[0].tool_name in ("weather", "clock")
    assert response.response.startswith(("Fog in", "Noon"))


def test_engine_errors_leave_predict_and_call(llm: LocalLLM) -> None:
    from llm_connectors.llama_index import ContextOverflowError

    with pytest.raises(ContextOverflowError):
        llm.predict_and_call(TOOLS, "Hi", max_tokens=10**6)


# ---- agents on real models


def memory() -> ChatMemoryBuffer:
    return ChatMemoryBuffer.from_defaults(token_limit=3000, tokenizer_fn=str.split)


def test_agents_with_forced_calls_share_the_batch(llm: LocalLLM, tiny: Engine) -> None:
    """Two steps each: a call that the grammar forces, then an answer."""
    agent_llm = llm.with_options(tool_parser="hermes", max_tokens=80)

    async def main() -> list[list[Any]]:
        agents = [
            FunctionAgent(tools=TOOLS, llm=agent_llm, initial_tool_choice="weather")
            for _ in range(6)
        ]

        async def run(agent: FunctionAgent) -> list[Any]:
            handler = agent.run(user_msg="Weather in Oslo?", memory=memory(), max_iterations=3)
            events = [event async for event in handler.stream_events()]
            await handler
            return events

        return await asyncio.gather(*map(run, agents))

    before = tiny.stats()
    runs = asyncio.run(main())
    for events in runs:
        first = next(event for event in events if isinstance(event, ToolCallResult))
        assert first.tool_name == "weather"
        assert str(first.tool_output).startswith("Fog in")
    after = tiny.stats()
    assert after.requests_finished - before.requests_finished >= 12
    assert after.peak_running >= 4


REACT_STEP = (
    r"Thought: [A-Za-z ,]{5,40}\.\nAction: weather\n"
    r'Action Input: \{"city": "(Oslo|Rome)", "days": [1-9]\}'
)


@pytest.mark.demo_model
def test_agents_on_the_demo_model(demo_model: str) -> None:
    """The three kinds, two of each at once; the grammar holds their first step to a call."""
    with Engine(demo_model, device="cpu", num_threads=1, max_model_len=1536) as engine:
        llm = LocalLLM(engine=engine, max_tokens=40, temperature=0.0, tool_parser="hermes")
        direct = FunctionTool.from_defaults(weather, fn_schema=Place, return_direct=True)

        def agents() -> list[Any]:
            first: dict[str, Any] = {"llm": llm, "initial_tool_choice": "weather"}
            return [
                FunctionAgent(tools=TOOLS[:1], **first),
                AgentWorkflow(agents=[FunctionAgent(tools=TOOLS[:1], **first)]),
                ReActAgent(tools=[direct], llm=llm.with_options(regex=REACT_STEP, max_tokens=80)),
            ]

        async def run(agent: Any) -> list[Any]:
            handler = agent.run(user_msg="What is the weather in Rome?", memory=memory())
            events = [event async for event in handler.stream_events()]
            assert str(await handler)
            return events

        async def main() -> list[list[Any]]:
            return await asyncio.gather(*map(run, [*agents(), *agents()]))

        for events in asyncio.run(main()):
            results = [event for event in events if isinstance(event, ToolCallResult)]
            assert str(results[0].tool_output).startswith("Fog in ")
        print("peak", engine.stats().peak_running)
        assert engine.stats().peak_running == 6
