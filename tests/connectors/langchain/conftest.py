import pytest
from langchain_fake_engine import FakeEngine, FakeShared

import engine
from llm_connectors import _runtime
from llm_connectors.langchain import ChatLocal, LocalLLM


@pytest.fixture
def fake_engine():
    engine = FakeEngine()
    yield engine
    engine.gate.set()
    engine.close()


@pytest.fixture
def chat(fake_engine):
    return ChatLocal(engine=fake_engine)


@pytest.fixture
def llm(fake_engine):
    return LocalLLM(engine=fake_engine)


@pytest.fixture(params=[ChatLocal, LocalLLM], ids=["chat", "llm"])
def model_class(request):
    return request.param


@pytest.fixture
def model(model_class, fake_engine):
    return model_class(engine=fake_engine)


@pytest.fixture
def shared(monkeypatch):
    monkeypatch.setattr(_runtime, "_REFERENCES", _runtime._References())
    fake = FakeShared()
    monkeypatch.setattr(engine, "Engine", fake)
    return fake
