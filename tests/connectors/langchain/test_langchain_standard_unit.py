"""LangChain's own unit suite for chat models."""

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

    # `bind_tools` and `with_structured_output` are overridden to raise an error that says why;
    # the suite would take that for having them.
    @property
    def has_tool_calling(self):
        return False

    @property
    def has_structured_output(self):
        return False


def test_constructing_loads_nothing_and_needs_no_such_model():
    chat = ChatLocal(model="no-such-model-anywhere")
    assert not chat._lease.is_loaded
    with pytest.raises(ModelNotFoundError, match="no-such-model-anywhere"):
        chat.load()
