"""The classes on a real engine and a real model: batching, caching, aborting, counting, sharing."""

import asyncio
import pickle
import time

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool

from engine import ContextOverflowError, Engine, SamplingParams
from llm_connectors.langchain import ChatLocal, LocalLLM

pytestmark = pytest.mark.demo_model

ENGINE_KWARGS = {"device": "cpu", "num_threads": 1, "max_num_seqs": 16, "max_model_len": 1024}
# Asked so that the likeliest first token leads clearly: "What is …?" is a tie in bfloat16.
QUESTIONS = [f"Name the capital of {name}." for name in ("France", "Japan", "Egypt", "Peru")]


@pytest.fixture(scope="module")
def engine(demo_model):
    with Engine(demo_model, **ENGINE_KWARGS) as engine:
        yield engine


@pytest.fixture
def chat(engine):
    return ChatLocal(engine=engine, temperature=0.0, max_tokens=8)


@pytest.fixture
def llm(engine):
    return LocalLLM(engine=engine, temperature=0.0, max_tokens=8)


def idle(engine):
    deadline = time.monotonic() + 20
    while engine.stats().running or engine.stats().waiting or engine.stats().kv_blocks_used:
        assert time.monotonic() < deadline, engine.stats()
        time.sleep(0.01)
    return True


def test_chat_and_text_say_what_the_engine_says(engine, chat, llm):
    params = SamplingParams(temperature=0.0, max_tokens=8)
    conversation = [{"role": "user", "content": QUESTIONS[0]}]
    expected = engine.chat(conversation, params)
    answer = chat.invoke(QUESTIONS[0])
    assert answer.content == expected.outputs[0].text
    assert "Paris" in answer.content
    assert answer.usage_metadata["input_tokens"] == len(expected.prompt_token_ids)
    text = engine.generate("The capital of France is", params).outputs[0].text
    assert llm.invoke("The capital of France is") == text


def test_all_verbs_agree(chat):
    single = chat.invoke(QUESTIONS[0]).content

    async def astream():
        return "".join([chunk.content async for chunk in chat.astream(QUESTIONS[0])])

    assert "".join(chunk.content for chunk in chat.stream(QUESTIONS[0])) == single
    assert asyncio.run(astream()) == single
    assert asyncio.run(chat.ainvoke(QUESTIONS[0])).content == single
    assert chat.batch(QUESTIONS[:1] * 2)[1].content == single


def test_a_batch_of_a_chain_runs_as_one_batch(engine, chat):
    # No other test of this module runs as many at once.
    assert engine.stats().peak_running < 9
    prompt = ChatPromptTemplate.from_messages([("human", "Count from {start}.")])
    chain = prompt | chat.bind(max_tokens=6) | StrOutputParser()
    assert len(chain.batch([{"start": start} for start in range(9)])) == 9
    assert engine.stats().peak_running == 9
    assert idle(engine)


def test_bad_item_of_a_real_batch(engine, chat):
    answers = chat.batch([QUESTIONS[0], "word " * 2000], return_exceptions=True)
    assert "Paris" in answers[0].content
    assert isinstance(answers[1], ContextOverflowError)
    assert idle(engine)


def test_leaving_a_stream_frees_its_blocks(engine, chat):
    for _chunk in chat.stream("Tell me a long story.", max_tokens=500):
        break
    assert idle(engine)


def test_cancelling_frees_blocks(engine, chat):
    async def run():
        task = asyncio.create_task(chat.ainvoke("Tell me a long story.", max_tokens=500))
        while not engine.stats().running:
            await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return task.cancelled()

    assert asyncio.run(run())
    assert idle(engine)


def test_cached_prompt_tokens_are_reported(chat):
    system = SystemMessage("You are a careful assistant. " * 30)
    chat.invoke([system, HumanMessage("Hi")])
    answer = chat.invoke([system, HumanMessage("Hello")])
    assert answer.usage_metadata["input_token_details"]["cache_read"] >= 128
    salted = chat.invoke([system, HumanMessage("Hello")], cache_salt="another tenant")
    assert salted.usage_metadata["input_token_details"]["cache_read"] == 0


def test_token_counts_are_those_of_the_call(chat):
    messages = [
        SystemMessage("Be brief."),
        HumanMessage("Hi"),
        AIMessage("Yes?"),
        HumanMessage("?"),
    ]
    counted = chat.get_num_tokens_from_messages(messages)
    assert counted == chat.invoke(messages).usage_metadata["input_tokens"]
    assert chat.get_num_tokens("Hello world") == len(chat.get_token_ids("Hello world")) == 2
    assert chat.profile["max_input_tokens"] == 1024


def test_log_probabilities(chat):
    answer = chat.invoke(QUESTIONS[0], logprobs=True, top_logprobs=2)
    content = answer.response_metadata["logprobs"]["content"]
    assert "".join(one["token"] for one in content).startswith(answer.content)
    for one in content:
        assert one["top_logprobs"][0]["token"] == one["token"], "greedy takes the likeliest"
        assert len(one["top_logprobs"]) == 2


def test_several_answers_and_seeds(chat):
    prompt = chat._convert_input("Tell me a fact.")
    options = {"n": 3, "temperature": 1.0, "seed": 5}
    first = chat.generate_prompt([prompt], **options)
    again = chat.generate_prompt([prompt], **options)
    texts = [one.text for one in first.generations[0]]
    assert len(set(texts)) > 1
    assert texts == [one.text for one in again.generations[0]]


def test_many_event_loops_and_a_pickle_share_the_engine(demo_model):
    chat = ChatLocal(model=demo_model, engine_kwargs=ENGINE_KWARGS, temperature=0.0, max_tokens=8)
    copied = pickle.loads(pickle.dumps(chat))
    answers = [asyncio.run(one.ainvoke(QUESTIONS[0])).content for one in (chat, copied)]
    assert answers[0] == answers[1]
    assert chat._engine() is copied._engine()
    engine = chat._engine()
    chat.close()
    assert not engine.is_closed
    copied.close()
    assert engine.is_closed


def test_tools_are_counted_where_the_template_has_no_place_for_them(chat):
    """They are described in the system message, which is what a call with them is given too."""

    @tool
    def weather(city: str) -> str:
        """Tell the weather."""
        return "sunny"

    question = [HumanMessage("Rome?")]
    counted = chat.get_num_tokens_from_messages(question, tools=[weather])
    answer = chat.bind_tools([weather]).invoke(question, max_tokens=1)
    assert counted == answer.usage_metadata["input_tokens"]
    assert counted > chat.get_num_tokens_from_messages(question) + 50
