"""Our own suite for what LangChain's leave out, on both classes; and that it can fail."""

import time

import pytest
from langchain_core.language_models import FakeListLLM
from langchain_fake_engine import FakeEngine

from llm_connectors.langchain import ChatLocal, LocalLLM
from llm_connectors.testing.langchain import ModelCallTests


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
