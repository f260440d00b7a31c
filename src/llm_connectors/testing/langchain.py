"""What LangChain's standard suites leave out: lists, threads, loops, leaving early, rerankers.

For any chat model or LLM (`ModelCallTests`) and any document compressor or cross-encoder
(`RerankTests`), this package's or another's, in the manner of `langchain_tests`::

    class TestMyModel(ModelCallTests):
        @pytest.fixture
        def model(self):
            return MyModel(temperature=0)

A model is expected to give the same answer to the same input (`temperature=0`). Checks that need to
see inside the model are skipped unless their property says how. Needs pytest; nothing else imports
this module.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.language_models import BaseLanguageModel

QUESTIONS = [f"Say the number {number}." for number in range(8)]


class ModelCallTests(ABC):
    """Tests of one model. Override `model`, and the properties that say what can be seen."""

    @pytest.fixture
    @abstractmethod
    def model(self) -> BaseLanguageModel[Any]:
        """The model to test."""

    @property
    def bad_input(self) -> Any:
        """An input that fails while others of its list succeed; None for no such input."""
        return None

    @property
    def num_running(self) -> Callable[[], int] | None:
        """Counts the requests that the model works on now."""
        return None

    @property
    def heartbeat_s(self) -> float:
        """Longest time for which an event loop may be held up."""
        return 0.5

    @property
    def patience_s(self) -> float:
        """Longest time until nothing is worked on any more."""
        return 10.0

    # ---------------------------------------------------------------- lists

    def test_batch_gives_the_answers_of_single_calls_in_order(self, model: Any) -> None:
        """A list of inputs is a list of answers."""
        singles = [_text(model.invoke(question)) for question in QUESTIONS]
        assert [_text(answer) for answer in model.batch(QUESTIONS)] == singles

    def test_abatch_gives_the_answers_of_single_calls_in_order(self, model: Any) -> None:
        """Also in an event loop."""
        singles = [_text(model.invoke(question)) for question in QUESTIONS]
        answers = asyncio.run(model.abatch(QUESTIONS))
        assert [_text(answer) for answer in answers] == singles

    def test_batch_as_completed_gives_each_answer_once(self, model: Any) -> None:
        """With the index of its input."""
        pairs = list(model.batch_as_completed(QUESTIONS))
        assert sorted(index for index, _answer in pairs) == list(range(len(QUESTIONS)))
        singles = [_text(model.invoke(question)) for question in QUESTIONS]
        assert [_text(answer) for _index, answer in sorted(pairs, key=lambda pair: pair[0])] == (
            singles
        )

    def test_a_cap_changes_nothing_about_the_answers(self, model: Any) -> None:
        """`max_concurrency` is about how many run at once."""
        capped = model.batch(QUESTIONS, {"max_concurrency": 2})
        assert [_text(answer) for answer in capped] == [
            _text(answer) for answer in model.batch(QUESTIONS)
        ]

    def test_an_error_stays_with_its_input(self, model: Any) -> None:
        """The others are answered."""
        if self.bad_input is None:
            pytest.skip("needs the property bad_input")
        inputs = [QUESTIONS[0], self.bad_input, QUESTIONS[1]]
        answers = model.batch(inputs, return_exceptions=True)
        assert isinstance(answers[1], Exception)
        assert [_text(answers[0]), _text(answers[2])] == [
            _text(model.invoke(question)) for question in QUESTIONS[:2]
        ]
        with pytest.raises(type(answers[1])):
            model.batch(inputs)

    def test_an_empty_list_is_an_empty_list(self, model: Any) -> None:
        """No input, no answer."""
        assert model.batch([]) == []
        assert asyncio.run(model.abatch([])) == []

    # ---------------------------------------------------------------- threads and loops

    def test_many_threads_may_call_at_once(self, model: Any) -> None:
        """Each gets its own answer."""
        singles = [_text(model.invoke(question)) for question in QUESTIONS]
        with ThreadPoolExecutor(len(QUESTIONS)) as pool:
            answers = list(pool.map(model.invoke, QUESTIONS))
        assert [_text(answer) for answer in answers] == singles

    def test_event_loops_may_come_and_go_and_run_side_by_side(self, model: Any) -> None:
        """A model belongs to no event loop."""
        expected = _text(model.invoke(QUESTIONS[0]))
        for _ in range(2):
            assert _text(asyncio.run(model.ainvoke(QUESTIONS[0]))) == expected
        with ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(lambda: asyncio.run(model.ainvoke(QUESTIONS[0]))) for _ in "ab"]
            assert [_text(call.result()) for call in calls] == [expected, expected]

    def test_async_calls_do_not_hold_up_their_event_loop(self, model: Any) -> None:
        """Others in the loop go on."""
        model.invoke(QUESTIONS[0])

        async def longest_pause() -> float:
            pauses: list[float] = []
            call = asyncio.ensure_future(_all(model.ainvoke(question) for question in QUESTIONS))
            while not call.done():
                started_s = time.monotonic()
                await asyncio.sleep(0.001)
                pauses.append(time.monotonic() - started_s)
            await call
            return max(pauses, default=0.0)

        assert asyncio.run(longest_pause()) < self.heartbeat_s

    # ---------------------------------------------------------------- leaving early

    def test_a_stream_that_is_left_early_is_given_up(self, model: Any) -> None:
        """And the next call is answered as ever."""
        expected = _text(model.invoke(QUESTIONS[0]))
        for _chunk in model.stream("Tell a long story."):
            break
        self._expect_idle()
        assert _text(model.invoke(QUESTIONS[0])) == expected

    def test_a_task_that_is_cancelled_is_given_up(self, model: Any) -> None:
        """Likewise."""
        expected = _text(model.invoke(QUESTIONS[0]))

        async def cancel() -> None:
            task = asyncio.ensure_future(model.ainvoke("Tell a long story."))
            await asyncio.sleep(0.02)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(cancel())
        self._expect_idle()
        assert _text(model.invoke(QUESTIONS[0])) == expected

    def test_streams_may_run_side_by_side(self, model: Any) -> None:
        """Each in a thread of its own, each with its own text."""
        expected = {question: _text(model.invoke(question)) for question in QUESTIONS[:4]}
        found: dict[str, str] = {}

        def read(question: str) -> None:
            found[question] = "".join(_text(chunk) for chunk in model.stream(question))

        readers = [threading.Thread(target=read, args=(one,)) for one in expected]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert found == expected

    def _expect_idle(self) -> None:
        """Nothing is worked on any more, where that can be seen."""
        if self.num_running is None:
            return
        deadline = time.monotonic() + self.patience_s
        while self.num_running() and time.monotonic() < deadline:
            time.sleep(0.005)
        assert self.num_running() == 0


class RerankTests(ABC):
    """Tests of a document compressor that orders documents, or of a cross-encoder, or of both.

    What is a `BaseDocumentCompressor` has `compress_documents`, what is a `BaseCrossEncoder` has
    `score`; checks of the one that is lacking are skipped. All documents must be kept.
    """

    @pytest.fixture
    @abstractmethod
    def reranker(self) -> Any:
        """What to test. It keeps at least as many documents as it is given here, which are six."""

    @property
    def query(self) -> str:
        """What documents should answer."""
        return "When does the ferry to the island leave?"

    @property
    def texts(self) -> list[str]:
        """Six different texts."""
        return [
            "The ferry leaves at nine.",
            "Cats sleep for most of the day.",
            "The island has one harbour and two hotels.",
            "Bread needs flour, water, salt and time.",
            "At noon a second ferry leaves for the island.",
            "",
        ]

    @property
    def tolerance(self) -> float:
        """How far two scores of the same pair may be apart."""
        return 1e-4

    # ---------------------------------------------------------------- documents

    def _documents(self) -> list[Document]:
        return [
            Document(page_content=text, metadata={"place": place}, id=f"d{place}")
            for place, text in enumerate(self.texts)
        ]

    def test_documents_come_back_once_and_unchanged(self, reranker: Any) -> None:
        """In another order, with metadata added at most; what was given stays as it was."""
        compress = _method(reranker, "compress_documents")
        given = self._documents()
        found = compress(given, self.query)
        assert sorted(one.metadata["place"] for one in found) == list(range(len(given)))
        for one in found:
            original = self._documents()[one.metadata["place"]]
            assert (one.page_content, one.id) == (original.page_content, original.id)
        assert given == self._documents()

    def test_the_order_depends_on_the_documents_alone(self, reranker: Any) -> None:
        """Not on the order in which they are given, nor on how often it is asked."""
        compress = _method(reranker, "compress_documents")
        given = self._documents()
        first = [one.metadata["place"] for one in compress(given, self.query)]
        assert [one.metadata["place"] for one in compress(given, self.query)] == first
        turned = [one.metadata["place"] for one in compress(given[::-1], self.query)]
        assert turned == first

    def test_no_documents_are_no_documents(self, reranker: Any) -> None:
        """Of a retriever that has found nothing."""
        assert list(_method(reranker, "compress_documents")([], self.query)) == []

    def test_documents_of_equal_text_are_both_kept(self, reranker: Any) -> None:
        """Each with its own metadata."""
        twins = [Document(page_content=self.texts[0], metadata={"place": n}) for n in range(2)]
        found = _method(reranker, "compress_documents")(twins, self.query)
        assert {one.metadata["place"] for one in found} == {0, 1}

    def test_async_documents_are_the_same(self, reranker: Any) -> None:
        """In two event loops, one after the other, and many at once."""
        compress = _method(reranker, "compress_documents")
        expected = [one.metadata["place"] for one in compress(self._documents(), self.query)]

        async def many() -> list[Any]:
            calls = (reranker.acompress_documents(self._documents(), self.query) for _ in range(4))
            return await _all(calls)

        for _ in range(2):
            for found in asyncio.run(many()):
                assert [one.metadata["place"] for one in found] == expected

    def test_many_threads_may_ask_at_once(self, reranker: Any) -> None:
        """Each about its own documents."""
        compress = _method(reranker, "compress_documents")
        parts = [self._documents()[start:] for start in range(4)]
        expected = [[one.id for one in compress(part, self.query)] for part in parts]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda part: compress(part, self.query), parts))
        assert [[one.id for one in part] for part in found] == expected

    # ---------------------------------------------------------------- scores

    def test_each_pair_has_a_score_in_order(self, reranker: Any) -> None:
        """The one that it has alone."""
        score = _method(reranker, "score")
        pairs = [(self.query, text) for text in self.texts]
        found = [float(one) for one in score(pairs)]
        alone = [float(score([pair])[0]) for pair in pairs]
        assert found == pytest.approx(alone, abs=self.tolerance)
        assert len(set(found)) > 1, "all texts have the same score"

    def test_no_pairs_have_no_scores(self, reranker: Any) -> None:
        """Of a retriever that has found nothing."""
        assert list(_method(reranker, "score")([])) == []

    def test_scores_and_order_agree(self, reranker: Any) -> None:
        """What is both puts the documents with the best scores first."""
        score, compress = _method(reranker, "score"), _method(reranker, "compress_documents")
        scores = [float(one) for one in score([(self.query, text) for text in self.texts])]
        order = [one.metadata["place"] for one in compress(self._documents(), self.query)]
        for better, worse in itertools.pairwise(order):
            assert scores[better] >= scores[worse] - self.tolerance


def _method(reranker: Any, name: str) -> Callable[..., Any]:
    """A method of what is tested; skips the test where it has none."""
    method: Callable[..., Any] | None = getattr(reranker, name, None)
    if method is None:
        pytest.skip(f"{type(reranker).__name__} has no {name}")
    return method


def _text(answer: Any) -> str:
    """An answer's text: a string, or the text of a message."""
    return answer if isinstance(answer, str) else str(answer.text)


async def _all(calls: Any) -> list[Any]:
    awaited: list[Coroutine[Any, Any, Any]] = list(calls)
    return list(await asyncio.gather(*awaited))
