"""Options the engine knows nothing of: long prompts, pieces of streams, models that stay loaded."""

import asyncio
import copy
import gc
import pickle
import time

import pytest
from langchain_calls import VERBS
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_fake_engine import FakeEngine
from pydantic import ValidationError

from engine import ConfigError, ContextOverflowError, RequestError
from llm_connectors.langchain import ChatLocal, LocalEmbeddings, LocalLLM, LocalRerank

# ---------------------------------------------------------------- prompts that are too long


@pytest.fixture
def small_engine():
    """20 tokens; a prompt that leaves no room for its answer is refused, as by the real one."""
    with_room = FakeEngine(max_model_len=20)
    submit = with_room._submit

    def checked(prompts, params, submit_options):
        each = params if isinstance(params, list) else [params] * len(prompts)
        for prompt, one in zip(prompts, each, strict=True):
            if len(prompt) + (one.max_tokens or 1) > 20:
                raise ContextOverflowError(f"{len(prompt)} tokens of prompt")
        return submit(prompts, params, submit_options)

    with_room._submit = checked
    yield with_room
    with_room.close()


LONG = [
    SystemMessage("S!"),
    HumanMessage("first?"),
    AIMessage("first."),
    HumanMessage("call?"),
    AIMessage("", tool_calls=[{"name": "t", "args": {}, "id": "1"}]),
    ToolMessage("ok", tool_call_id="1"),
    AIMessage("2nd."),
    HumanMessage("last?"),
]


@pytest.mark.parametrize("verb", [name for name in VERBS if name != "agenerate"])
def test_the_oldest_turns_go_and_the_system_message_stays(small_engine, verb):
    chat = ChatLocal(engine=small_engine, max_tokens=5)
    plain = [one for one in LONG if not isinstance(one, ToolMessage) and one.content]
    with pytest.raises(ContextOverflowError):
        VERBS[verb](chat, plain)
    VERBS[verb](chat, plain, on_overflow="truncate_left")
    for request in small_engine.requests:
        # With "call?" and what follows it there would be 16 tokens.
        assert "".join(map(chr, request.ids)) == "S!last?"
    small_engine.requests.clear()
    VERBS[verb](chat, plain, on_overflow="truncate_left", max_tokens=4)
    assert {"".join(map(chr, one.ids)) for one in small_engine.requests} == {"S!call?2nd.last?"}


def test_a_tool_result_never_loses_its_call(small_engine):
    """Whatever room there is, what is left begins with a user's message."""
    small_engine.max_model_len = 1_000
    submit, seen = FakeEngine._submit, []

    def noted(prompts, params, submit_options):
        seen.append("".join(map(chr, prompts[0])))
        return submit(small_engine, prompts, params, submit_options)

    small_engine._submit = noted
    chat = ChatLocal(engine=small_engine, on_overflow="truncate_left")
    for room in range(7, 120):
        chat.invoke(LONG, max_tokens=1_000 - room)
    whole = max(seen, key=len)
    turns = whole[whole.index("first?") :], whole[whole.index("call?") :], "last?"
    assert {text.removeprefix("S!") for text in seen} == set(turns)
    assert "ok" in turns[1]
    assert all(len(text) <= room for room, text in enumerate(seen, 7))


def test_a_last_turn_that_is_too_long_is_refused(small_engine):
    chat = ChatLocal(engine=small_engine, max_tokens=5, on_overflow="truncate_left")
    with pytest.raises(ContextOverflowError, match="30 tokens"):
        chat.invoke([HumanMessage("gone"), AIMessage("gone"), HumanMessage("x" * 30)])
    assert chat.get_num_tokens_from_messages([HumanMessage("a" * 9), HumanMessage("b" * 30)]) == 39


@pytest.mark.parametrize("verb", VERBS)
def test_the_first_tokens_of_a_text_go(small_engine, verb):
    llm = LocalLLM(engine=small_engine, max_tokens=5)
    text = "abcdefghijklmnopqrstuvwxyz"
    with pytest.raises(ContextOverflowError):
        VERBS[verb](llm, text)
    VERBS[verb](llm, text, on_overflow="truncate_left")
    for request in small_engine.requests:
        assert request.ids == [1, *map(ord, "mnopqrstuvwxyz")], "the usual first token stays"
    small_engine.requests.clear()
    VERBS[verb](llm, "abcdef", on_overflow="truncate_left")
    for request in small_engine.requests:
        assert request.ids in ([*map(ord, "abcdef")], [1, *map(ord, "abcdef")])


def test_concurrent_calls_are_shortened_for_their_own_answers(small_engine):
    chat = ChatLocal(engine=small_engine, on_overflow="truncate_left")
    turns = [HumanMessage("1234567"), AIMessage("ok"), HumanMessage("last")]

    async def ask():
        await asyncio.gather(*(chat.ainvoke(turns, max_tokens=count) for count in (4, 15)))

    asyncio.run(ask())
    assert [len(request.ids) for request in small_engine.requests] == [13, 4]


# ---------------------------------------------------------------- pieces of a stream


async def _collected(stream):
    return [piece async for piece in stream]


def _pieces(model, how, **kwargs):
    text = "abcdefghij"
    if how == "stream":
        pieces = list(model.stream(text, **kwargs))
    elif how == "astream":
        pieces = asyncio.run(_collected(model.astream(text, **kwargs)))
    else:
        events = model.stream_events(text, version="v3", **kwargs)
        deltas = [one for one in events if one.get("event") == "content-block-delta"]
        return [one["delta"]["text"] for one in deltas]
    texts = [piece if isinstance(piece, str) else piece.content for piece in pieces]
    return [one for one in texts if one]


@pytest.mark.parametrize("how", ["stream", "astream", "stream_events"])
def test_pieces_have_the_tokens_asked_for(model_class, how):
    if how == "stream_events" and model_class is LocalLLM:
        return
    fake = FakeEngine(step_s=0.01)
    model = model_class(engine=fake, stream_interval=4)
    assert _pieces(model, how) == ["j", "ihgf", "edcb", "a"]
    assert _pieces(model, how, stream_interval=100) == ["j", "ihgfedcba"]
    assert len(_pieces(model, how, stream_interval="auto")) > 6
    if how == "stream":
        # Tokens without text count; a first piece has some.
        fake.answer_with = lambda text: "__ab_c_d"
        assert "".join(_pieces(model.bind(stream_interval=2), how)) == "__ab_c_d"
    fake.close()


@pytest.mark.parametrize(
    ("option", "value"),
    [("stream_interval", bad) for bad in (0, -1, True, 2.5, "often", None)]
    + [("on_overflow", bad) for bad in ("truncate", "", None)],
)
def test_bad_values_are_refused_at_once(model_class, model, option, value):
    with pytest.raises(ValidationError, match=option):
        model_class(engine=model.engine, **{option: value})
    with pytest.raises(RequestError, match=f"{option}=.* must be"):
        model.invoke("ab", **{option: value})


# ---------------------------------------------------------------- models that stay loaded


def _closed_in_time(loaded):
    deadline = time.monotonic() + 10
    while not loaded.is_closed and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    return loaded.is_closed


@pytest.mark.parametrize("made", [ChatLocal, LocalLLM, LocalEmbeddings, LocalRerank])
def test_a_model_nobody_wants_kept_goes_with_its_last_user(shared, made):
    first = made(model="m", keep_loaded=False).load()
    others = [pickle.loads(pickle.dumps(first)), copy.deepcopy(first)]
    for other in others:
        assert other.load()._lease.keep_loaded is False
    loaded = first._engine()
    del first, other
    others.pop()
    gc.collect()
    time.sleep(0.05)
    assert not loaded.is_closed, "one object still uses it"
    others.pop()
    assert _closed_in_time(loaded)
    again = made(model="m", keep_loaded=False).load()
    assert len(shared.loads) == 2
    assert not again._engine().is_closed


def test_one_that_wants_it_kept_is_enough(shared, model_class):
    kept = model_class(model="m").load()
    brief = model_class(model="m", keep_loaded=False).load()
    loaded = kept._engine()
    assert brief._engine() is loaded
    del kept, brief
    gc.collect()
    time.sleep(0.1)
    assert not loaded.is_closed
    again = model_class(model="m", keep_loaded=False).load()
    again.close()
    assert loaded.is_closed, "close frees it in any case"


def test_an_engine_of_ones_own_is_closed_by_its_maker(fake_engine, model_class):
    with pytest.raises((ConfigError, ValidationError), match="keep_loaded=False cannot be applied"):
        model_class(engine=fake_engine, keep_loaded=False)
