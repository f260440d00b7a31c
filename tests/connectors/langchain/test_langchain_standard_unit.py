"""LangChain's own unit suite for chat models, with every flag on."""

import pytest
from langchain_tests.unit_tests import ChatModelUnitTests

from engine import ModelNotFoundError
from llm_connectors.langchain import ChatLocal


class TestChatLocalStandardUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self):
        return ChatLocal

    @property
    def chat_model_params(self):
        return {"model": "smollm2-135m"}

    @property
    def supports_json_mode(self):
        return True

    @property
    def supports_anthropic_inputs(self):
        return True

    @property
    def supports_model_override(self):
        return True

    @property
    def model_override_value(self):
        return "another"

    @property
    def init_from_env_params(self):
        environment = {"LLM_CONNECTORS_MODEL": "smollm2-135m", "LLM_CONNECTORS_DEVICE": "cpu"}
        expected = {"model": "smollm2-135m", "engine_kwargs": {"device": "cpu"}}
        return environment, {}, expected


def test_what_is_given_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("LLM_CONNECTORS_MODEL", "one")
    monkeypatch.setenv("LLM_CONNECTORS_DTYPE", "float32")
    chat = ChatLocal(model="another", engine_kwargs={"dtype": "bfloat16", "device": "cpu"})
    assert chat.model == "another"
    assert chat.engine_kwargs == {"dtype": "bfloat16", "device": "cpu"}


def test_constructing_loads_nothing_and_needs_no_such_model():
    chat = ChatLocal(model="no-such-model-anywhere")
    assert not chat._lease.is_loaded
    with pytest.raises(ModelNotFoundError, match="no-such-model-anywhere"):
        chat.load()
