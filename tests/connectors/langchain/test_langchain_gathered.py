"""Async calls that begin together are one hand-over; errors, options and ends stay apart."""

import asyncio

import pytest
from langchain_core.messages import HumanMessage

from engine import ContextOverflowError, RequestError
from llm_connectors import _gathered
from llm_connectors.langchain import ChatLocal


async def streamed(chat, text, **options):
    return "".join([chunk.text async for chunk in chat.astream(text, **options)])


async def answered(chat, text, **options):
    return (await chat.ainvoke(text, **options)).text


VERBS = [answered, streamed]
each_verb = pytest.mark.parametrize("verb", VERBS)


@each_verb
@pytest.mark.parametrize("inline_chars", [10, 8192])
def test_calls_of_one_turn_are_one_hand_over(chat, fake_engine, monkeypatch, verb, inline_chars):
    monkeypatch.setattr(_gathered, "MAX_INLINE_CHARS", inline_chars)

    async def run():
        return await asyncio.gather(*(verb(chat, f"text {number}") for number in range(20)))

    assert asyncio.run(run()) == [f"text {number}"[::-1] for number in range(20)]
    assert fake_engine.hand_overs == [20]


def test_long_lists_come_in_pieces(chat, fake_engine, monkeypatch):
    monkeypatch.setattr(_gathered, "MAX_INLINE_CHARS", 10)
    monkeypatch.setattr(_gathered, "_PROMPTS_PER_PIECE", 8)

    async def run():
        return await asyncio.gather(*(answered(chat, f"text {number}") for number in range(20)))

    assert asyncio.run(run()) == [f"text {number}"[::-1] for number in range(20)]
    assert fake_engine.hand_overs == [8, 8, 4]


def test_long_texts_are_answered_without_worker_threads(chat, fake_engine, monkeypatch):
    """A loop that is about to end has none left; nobody may wait for ever."""
    monkeypatch.setattr(_gathered, "MAX_INLINE_CHARS", 10)

    async def run():
        await asyncio.get_running_loop().shutdown_default_executor()
        texts = (answered(chat, f"text {number}") for number in range(3))
        return await asyncio.wait_for(asyncio.gather(*texts), 10)

    assert asyncio.run(run()) == [f"text {number}"[::-1] for number in range(3)]


def test_a_call_of_a_later_turn_waits_for_nobody(chat, fake_engine):
    async def run():
        first = asyncio.ensure_future(answered(chat, "ab"))
        while not fake_engine.hand_overs:
            await asyncio.sleep(0)
        return await asyncio.gather(first, answered(chat, "cd"))

    assert asyncio.run(run()) == ["ba", "dc"]
    assert fake_engine.hand_overs == [1, 1]


@each_verb
def test_a_bad_prompt_is_told_to_its_own_caller(chat, fake_engine, verb):
    texts = ["ab", "REFUSE", "cd", "x" * 20_000]

    async def run():
        return await asyncio.gather(*(verb(chat, text) for text in texts), return_exceptions=True)

    first, refused, third, too_long = asyncio.run(run())
    assert (first, third) == ("ba", "dc")
    assert isinstance(refused, RequestError)
    assert isinstance(too_long, ContextOverflowError)


@pytest.mark.parametrize("inline_chars", [10, 8192])
def test_a_conversation_that_cannot_be_rendered_spoils_no_other(
    chat, fake_engine, monkeypatch, inline_chars
):
    monkeypatch.setattr(_gathered, "MAX_INLINE_CHARS", inline_chars)
    render = fake_engine.apply_chat_template

    def picky(messages, **options):
        if messages[0]["content"] == "bad one":
            raise RequestError("bad one")
        return render(messages, **options)

    monkeypatch.setattr(fake_engine, "apply_chat_template", picky)

    async def run():
        texts = ["good one", "bad one", "other one"]
        calls = (answered(chat, text) for text in texts)
        return await asyncio.gather(*calls, return_exceptions=True)

    first, bad, third = asyncio.run(run())
    assert (first, third) == ("eno doog", "eno rehto")
    assert isinstance(bad, RequestError)


def test_each_call_keeps_its_own_options(fake_engine):
    chat, other = ChatLocal(engine=fake_engine), ChatLocal(engine=fake_engine, priority=3)

    async def run():
        return await asyncio.gather(
            answered(chat, "abc", max_tokens=1),
            answered(chat, "abc", max_tokens=2),
            answered(other, "abc"),
            answered(chat, "abc", stop=["b"]),
        )

    assert asyncio.run(run()) == ["c", "cb", "cba", "c"]
    by_priority = [request.submit_options["priority"] for request in fake_engine.requests]
    assert sorted(by_priority) == [0, 0, 0, 3]
    # Neighbours that go together; the one between them has an order of its own.
    assert fake_engine.hand_overs == [2, 1, 1]


@pytest.mark.parametrize("inline_chars", [10, 8192])
def test_who_is_cancelled_before_the_hand_over_is_left_out(
    chat, fake_engine, monkeypatch, inline_chars
):
    monkeypatch.setattr(_gathered, "MAX_INLINE_CHARS", inline_chars)

    async def run():
        calls = [asyncio.ensure_future(answered(chat, f"a text {number}")) for number in range(3)]
        await asyncio.sleep(0)
        calls[1].cancel()
        return await asyncio.gather(*calls, return_exceptions=True)

    first, cancelled, third = asyncio.run(run())
    assert (first, third) == ("0 txet a", "2 txet a")
    assert isinstance(cancelled, asyncio.CancelledError)
    assert len(fake_engine.requests) == 2


def test_who_is_cancelled_with_the_request_on_its_way_aborts_it(chat, fake_engine):
    fake_engine.gate.clear()

    async def run():
        call = asyncio.ensure_future(answered(chat, "ab"))
        # The future that the call waits for is set in the same turn as the hand-over.
        while not fake_engine.requests:
            await asyncio.sleep(0)
            if fake_engine.requests:
                call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(run())
    assert fake_engine.aborted == [fake_engine.requests[0].request_id]


def test_two_loops_do_not_meet(chat, fake_engine):
    """A loop that ended with a call waiting leaves nothing behind for the next one."""
    loop = asyncio.new_event_loop()
    left = chat.ainvoke([HumanMessage("left")])
    task = loop.create_task(left)
    loop.call_soon(loop.stop)
    loop.run_forever()
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()
    assert asyncio.run(answered(chat, "ab")) == "ba"
