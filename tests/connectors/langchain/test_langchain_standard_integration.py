"""LangChain's own integration suite, on the demo model, with every flag that a text model can have.

What is off: images, PDF, audio and video, because the engine reads text only; recorded HTTP
cassettes, because there is no HTTP.
"""

import gc
import operator
from functools import reduce

import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests

from llm_connectors.langchain import ChatLocal, register_model, unregister_model

ENGINE_KWARGS = {"device": "cpu", "num_threads": 1, "max_num_seqs": 16, "max_model_len": 2048}
OTHER_NAME = "smollm2-by-another-name"
# A template that opens a reasoning block, for the counts of reasoning tokens.
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n<think>\n"
)


@pytest.fixture(scope="module", autouse=True)
def _demo_engine(demo_model):
    """Loaded once for the module, closed at its end.

    An engine stays as long as an object that used it lives, and the suite's own objects live in
    reference cycles until the garbage collector finds them.
    """
    chat = ChatLocal(model=demo_model, engine_kwargs=ENGINE_KWARGS).load()
    engine = chat._engine()
    register_model(OTHER_NAME, engine=engine)
    yield
    unregister_model(OTHER_NAME)
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
            "max_tokens": 64,
            # The suite wants non-empty answers.
            "min_tokens": 1,
        }

    @property
    def supports_json_mode(self):
        return True

    @property
    def supports_model_override(self):
        return True

    @property
    def model_override_value(self):
        return OTHER_NAME

    @property
    def supports_anthropic_inputs(self):
        return True

    @property
    def supports_image_inputs(self):
        return False  # the engine reads text only

    @property
    def supported_usage_metadata_details(self):
        details = ["cache_read_input", "cache_creation_input", "reasoning_output"]
        return {"invoke": details, "stream": details}

    @pytest.mark.xfail(
        reason="needs a model that decides to call a tool; this one has 135M weights"
    )
    @pytest.mark.parametrize("model", [{}, {"output_version": "v1"}], indirect=True)
    def test_agent_loop(self, model):
        super().test_agent_loop(model)

    def invoke_with_cache_read_input(self, *, stream=False):
        question = "Say yes. " * 60
        self._chat().invoke(question)
        answer = self._ask(question, stream)
        assert answer.usage_metadata["input_token_details"]["cache_read"] >= 64
        return answer

    def invoke_with_cache_creation_input(self, *, stream=False):
        self._chat()._engine().reset_prefix_cache()
        answer = self._ask("Say no. " * 60, stream)
        assert answer.usage_metadata["input_token_details"]["cache_creation"] >= 64
        return answer

    def invoke_with_reasoning_output(self, *, stream=False):
        answer = self._ask("Why?", stream, chat_template=THINKING, max_tokens=16)
        assert answer.usage_metadata["output_token_details"]["reasoning"] > 0
        return answer

    def _chat(self):
        return ChatLocal(**self.chat_model_params)

    def _ask(self, question, stream, **options):
        if stream:
            return reduce(operator.add, self._chat().stream(question, **options))
        return self._chat().invoke(question, **options)
