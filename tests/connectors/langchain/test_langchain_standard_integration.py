"""LangChain's own integration suite, on the demo model.

What needs tools or structured output is skipped by the suite itself, because the properties below
say that they are not there yet.
"""

import gc
import operator
from functools import reduce

import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests

from llm_connectors.langchain import ChatLocal

ENGINE_KWARGS = {"device": "cpu", "num_threads": 1, "max_num_seqs": 16, "max_model_len": 2048}


@pytest.fixture(scope="module", autouse=True)
def _demo_engine(demo_model):
    """Loaded once for the module, closed at its end.

    An engine stays as long as an object that used it lives, and the suite's own objects live in
    reference cycles until the garbage collector finds them.
    """
    chat = ChatLocal(model=demo_model, engine_kwargs=ENGINE_KWARGS).load()
    engine = chat._engine()
    yield
    gc.collect()
    chat.close()
    # The model of the test that ran last is still in pytest's hands, and with it a reference.
    engine.close()
    assert engine.is_closed


@pytest.mark.demo_model
class TestChatLocalStandardIntegration(ChatModelIntegrationTests):
    @property
    def chat_model_class(self):
        return ChatLocal

    @property
    def chat_model_params(self):
        return {
            "model": "smollm2-135m",
            "engine_kwargs": ENGINE_KWARGS,
            "temperature": 0.0,
            "max_tokens": 16,
            # The suite wants non-empty answers.
            "min_tokens": 1,
        }

    @property
    def has_tool_calling(self):
        return False  # tools come with constrained decoding

    @property
    def has_structured_output(self):
        return False  # likewise

    @property
    def supports_model_override(self):
        return False  # one engine has one model; there are no registered aliases yet

    @property
    def supports_image_inputs(self):
        return False  # the engine reads text only

    @property
    def supported_usage_metadata_details(self):
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream=False):
        chat = ChatLocal(**self.chat_model_params)
        question = "Say yes. " * 60
        chat.invoke(question)
        if stream:
            answer = reduce(operator.add, chat.stream(question))
        else:
            answer = chat.invoke(question)
        assert answer.usage_metadata["input_token_details"]["cache_read"] >= 64
        return answer
