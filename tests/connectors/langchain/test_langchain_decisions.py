"""Ballots: exact probabilities of given answers; and `LocalDecisions` where core has decisions."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from langchain_core.messages import AIMessage, HumanMessage

import engine
from engine import Engine
from llm_connectors.langchain._ballots import LETTERS, YES_NO, Ballot, submit_ballots

HAS_DECISIONS = importlib.util.find_spec("langchain_core.decisions") is not None
needs_decisions = pytest.mark.skipif(not HAS_DECISIONS, reason="needs langchain-core 1.8")

BALLOTS = [Ballot("Is it?", YES_NO), Ballot("Which one?", LETTERS[:5]), Ballot("x", ("only",))]


def test_probabilities_are_those_of_the_model(tiny_llama: Path, tiny_engine: Engine) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tallies = submit_ballots(tiny_engine, BALLOTS).wait(timeout=60)
    for ballot, tally in zip(BALLOTS, tallies, strict=True):
        ids = tiny_engine.apply_chat_template([{"role": "user", "content": ballot.text}])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        tokens = [tiny_engine.tokenize(option)[0] for option in ballot.options]
        expected = torch.softmax(logits[tokens], 0).tolist()
        assert tally.probabilities == pytest.approx(expected, abs=1e-4)
        assert sum(tally.probabilities) == pytest.approx(1)
        assert tally.num_prompt_tokens == len(ids) * len(tokens)


async def test_ballots_on_the_event_loop(tiny_engine: Engine) -> None:
    expected = submit_ballots(tiny_engine, BALLOTS).wait(timeout=60)
    found = await submit_ballots(tiny_engine, BALLOTS).await_all(timeout=60)
    for one, other in zip(found, expected, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    many = [Ballot(f"{n} text " * 9, LETTERS) for n in range(20)]
    task = asyncio.create_task(submit_ballots(tiny_engine, many).await_all(timeout=None))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(engine.RequestTimeoutError):
        await submit_ballots(tiny_engine, many).await_all(timeout=0.001)
    with pytest.raises(engine.RequestTimeoutError):
        submit_ballots(tiny_engine, many).wait(timeout=0.001)


def test_one_prompt_is_computed_once(tiny_engine: Engine) -> None:
    [tally] = submit_ballots(tiny_engine, [Ballot("q" * 200, LETTERS)]).wait(timeout=60)
    assert tally.num_cached_tokens > 0.7 * tally.num_prompt_tokens


def test_ballots_that_cannot_be_cast(tiny_engine: Engine) -> None:
    with pytest.raises(engine.RequestError, match="with the same first token"):
        submit_ballots(tiny_engine, [Ballot("x", ("Yes", "Yet"))])
    with pytest.raises(engine.ContextOverflowError, match="the model reads 511"):
        submit_ballots(tiny_engine, [Ballot("x" * 600, YES_NO)])


@pytest.mark.skipif(HAS_DECISIONS, reason="langchain-core has decisions here")
def test_an_older_core_is_named() -> None:
    import llm_connectors.langchain

    with pytest.raises(ImportError, match=r"LocalDecisions needs langchain-core 1\.8"):
        _ = llm_connectors.langchain.LocalDecisions


# -------------------------------------------------------------------- langchain-core 1.8


@pytest.fixture
def decisions(tiny_engine: Engine) -> Any:
    from llm_connectors.langchain import LocalDecisions

    return LocalDecisions(engine=tiny_engine)


def questions() -> dict[str, Any]:
    from langchain_core.decisions import Choice, Noul, Score

    return {
        "urgent": Noul(instructions="Urgent?", criteria={"true": "now", "false": "later"}),
        "team": Choice(instructions="Who?", criteria={"sales": "prices", "other": None}),
        "mood": Score(instructions="How?", criteria=["calm", "tense", {"level": "angry"}]),
    }


@needs_decisions
def test_answers(decisions: Any) -> None:
    response = decisions.invoke({"state": "Help!", "questions": questions()})
    assert list(response.answers) == ["urgent", "team", "mood"]
    assert 0 <= response.nouls["urgent"].noul <= 1
    team = response.choices["team"]
    assert team.confidence == max(team.probabilities.values())
    assert team.probabilities[team.choice] == team.confidence
    mood = response.scores["mood"]
    assert mood.score == pytest.approx(sum(n * p for n, p in mood.probabilities.items()))
    assert mood.legend[2] == {"level": "angry"}
    assert response.usage["output_tokens"] == 7
    assert response.usage["input_token_details"]["cache_read"] > 0
    found = asyncio.run(decisions.ainvoke({"state": "Help!", "questions": questions()}))
    assert found.nouls["urgent"].noul == pytest.approx(response.nouls["urgent"].noul, abs=1e-5)
    assert len(decisions.batch([{"state": "a", "questions": questions()}] * 3)) == 3


@needs_decisions
@pytest.mark.parametrize(
    "state",
    [
        HumanMessage("hi"),
        [HumanMessage("hi"), AIMessage([{"type": "text", "text": "ho"}])],
        {"ticket": 3, "messages": [HumanMessage("hi")], "tags": ["a", None]},
    ],
)
def test_states(decisions: Any, state: Any) -> None:
    assert decisions.invoke({"state": state, "questions": questions()}).answers


@needs_decisions
def test_what_is_refused(decisions: Any, tiny_engine: Engine) -> None:
    from langchain_core import exceptions as core
    from langchain_core.decisions import Box, Choice

    from llm_connectors.langchain import LocalDecisions

    many = Choice(instructions="x", criteria={str(n): None for n in range(27)})
    image = {"type": "image", "url": "x"}
    for state, asked, named in (
        ("x", {"b": Box(instructions="where?")}, "reads text only"),
        ("x", {"m": many}, "27 options"),
        ("x", {}, "questions is empty"),
        ({"picture": image}, questions(), "block of type 'image'"),
        (HumanMessage([image]), questions(), "block of type 'image'"),
    ):
        with pytest.raises(core.ModelInvalidRequestError, match=named):
            decisions.invoke({"state": state, "questions": asked})
    with pytest.raises(core.ContextOverflowError):
        decisions.invoke({"state": "x" * 600, "questions": questions()})
    with pytest.raises(ValueError, match="on_overflow"):
        LocalDecisions(engine=tiny_engine, on_overflow="truncate")
