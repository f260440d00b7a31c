"""Our own suite for what LangChain's leave out, on both classes; and that it can fail."""

import time

import pytest
from langchain_core.language_models import FakeListLLM
from langchain_fake_engine import FakeEngine
from tiny_encoders import write_encoder

from engine import Engine
from llm_connectors.langchain import ChatLocal, LocalLLM, LocalRerank
from llm_connectors.testing.langchain import ModelCallTests, RerankTests


class OnAFakeEngine(ModelCallTests):
    @pytest.fixture(autouse=True)
    def engine(self):
        self.fake = FakeEngine(step_s=0.001)
        yield self.fake
        self.fake.close()

    @property
    def bad_input(self):
        return "REFUSE"

    @property
    def num_running(self):
        return lambda: len(self.fake._running)


class TestChatLocalCalls(OnAFakeEngine):
    @pytest.fixture
    def model(self):
        return ChatLocal(engine=self.fake)


class TestLocalLLMCalls(OnAFakeEngine):
    @pytest.fixture
    def model(self):
        return LocalLLM(engine=self.fake)


@pytest.fixture(scope="module", params=[ChatLocal, LocalLLM])
def on_the_demo_model(request, demo_model):
    kwargs = {"device": "cpu", "num_threads": 1, "max_num_seqs": 16, "max_model_len": 512}
    made = request.param(model=demo_model, temperature=0, max_tokens=3, engine_kwargs=kwargs)
    yield made.load()
    made._engine().close()


@pytest.mark.demo_model
class TestDemoModelCalls(ModelCallTests):
    @pytest.fixture
    def model(self, on_the_demo_model):
        self.engine = on_the_demo_model._engine()
        return on_the_demo_model

    @property
    def bad_input(self):
        return "too long " * 600

    @property
    def num_running(self):
        return lambda: self.engine.stats().running


@pytest.fixture(scope="module", params=["ForSequenceClassification", "Model"])
def scoring_engine(request, tmp_path_factory):
    """A cross-encoder, and a model that embeds."""
    folder = tmp_path_factory.mktemp(request.param)
    labels = {"num_labels": 1} if request.param != "Model" else {}
    write_encoder(folder, "bert", request.param, **labels)
    with Engine(str(folder), device="cpu", num_threads=1) as engine:
        yield engine


class TestLocalRerank(RerankTests):
    @pytest.fixture
    def reranker(self, scoring_engine):
        return LocalRerank(engine=scoring_engine, top_n=None)


@pytest.mark.embedding_model
class TestLocalRerankOnRealWeights(RerankTests):
    @pytest.fixture
    def reranker(self, embedding_model):
        return LocalRerank(model=embedding_model, top_n=6, engine_kwargs={"device": "cpu"})

    def test_what_answers_comes_first(self, reranker):
        best = reranker.compress_documents(self._documents(), self.query)[:3]
        assert {one.metadata["place"] for one in best} >= {0, 4}


class WordCounter:
    """A reranker that is right, and has the places where the ones below go wrong."""

    def score(self, pairs):
        return [self.one(query, text) for query, text in pairs]

    def one(self, query, text):
        return len(set(query.lower().split()) & set(text.lower().split())) + len(text) / 1000

    def compress_documents(self, documents, query, callbacks=None):
        scored = [(self.one(query, one.page_content), one) for one in documents]
        return [one for _, one in sorted(scored, key=lambda pair: -pair[0])]

    async def acompress_documents(self, documents, query, callbacks=None):
        return self.compress_documents(documents, query)


class Drops(WordCounter):
    def compress_documents(self, documents, query, callbacks=None):
        return super().compress_documents(documents, query)[:-1]


class Scribbles(WordCounter):
    def compress_documents(self, documents, query, callbacks=None):
        for document in documents:
            document.metadata["seen"] = True
        return super().compress_documents(documents, query)


class Turns(WordCounter):
    def compress_documents(self, documents, query, callbacks=None):
        return documents[::-1]


class Unsorted(WordCounter):
    def score(self, pairs):
        return sorted(super().score(pairs))


class Sleepy(WordCounter):
    """In an event loop it forgets what it was asked."""

    async def acompress_documents(self, documents, query, callbacks=None):
        return list(documents)


class Refuses(WordCounter):
    def score(self, pairs):
        return super().score(pairs) if pairs else [0.0]


class Merges(WordCounter):
    def compress_documents(self, documents, query, callbacks=None):
        by_text = {one.page_content: one for one in documents}
        return super().compress_documents(list(by_text.values()), query)


SUITE = TestLocalRerank()
CHECKS = sorted(name for name in dir(RerankTests) if name.startswith("test_"))


def outcome(reranker, check):
    try:
        getattr(SUITE, check)(reranker)
    except AssertionError:
        return False
    return True


def test_the_rerank_suite_passes_who_is_right_and_skips_what_is_lacking():
    assert all(outcome(WordCounter(), check) for check in CHECKS)
    with pytest.raises(pytest.skip.Exception, match="has no score"):
        SUITE.test_no_pairs_have_no_scores(object())


@pytest.mark.parametrize(
    ("faulty", "check"),
    [
        (Drops, "test_documents_come_back_once_and_unchanged"),
        (Scribbles, "test_documents_come_back_once_and_unchanged"),
        (Turns, "test_the_order_depends_on_the_documents_alone"),
        (Turns, "test_scores_and_order_agree"),
        (Unsorted, "test_each_pair_has_a_score_in_order"),
        (Sleepy, "test_async_documents_are_the_same"),
        (Refuses, "test_no_pairs_have_no_scores"),
        (Merges, "test_documents_of_equal_text_are_both_kept"),
    ],
)
def test_the_rerank_suite_finds_faults(faulty, check):
    assert not outcome(faulty(), check)


def test_the_suite_finds_mixed_up_answers():
    """A model that answers in turn, whatever is asked."""
    suite = TestLocalLLMCalls()
    model = FakeListLLM(responses=[str(number) for number in range(100)])
    for name in (
        "test_batch_gives_the_answers_of_single_calls_in_order",
        "test_abatch_gives_the_answers_of_single_calls_in_order",
        "test_many_threads_may_call_at_once",
        "test_batch_as_completed_gives_each_answer_once",
        "test_streams_may_run_side_by_side",
    ):
        with pytest.raises(AssertionError):
            getattr(suite, name)(model)


def test_the_suite_finds_a_blocked_loop_and_requests_that_go_on():
    suite = TestLocalLLMCalls()

    class Blocked:
        def invoke(self, text):
            return text

        async def ainvoke(self, text):
            time.sleep(0.1)
            return text

    with pytest.raises(AssertionError):
        suite.test_async_calls_do_not_hold_up_their_event_loop(Blocked())

    class Stubborn(TestLocalLLMCalls):
        num_running = property(lambda self: lambda: 1)
        patience_s = 0.05

    with pytest.raises(AssertionError):
        Stubborn()._expect_idle()
