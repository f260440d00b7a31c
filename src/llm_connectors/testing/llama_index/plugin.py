"""The option `--llm-factory` and the fixture that calls it."""

from __future__ import annotations

import importlib

import pytest

from llm_connectors.testing.llama_index.subject import Subject


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption(
        "--llm-factory",
        metavar="MODULE:FUNCTION",
        help="function that makes the LLM (or Subject) to check",
    )


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    """What the factory makes, anew for each check."""
    name = request.config.getoption("--llm-factory", default=None)
    if not name or ":" not in name:
        pytest.fail("Pass --llm-factory MODULE:FUNCTION, a function that makes the LLM to check.")
    module, function = name.split(":", 1)
    made = getattr(importlib.import_module(module), function)()
    made = made if isinstance(made, Subject) else Subject(made)
    made.factory = made.factory or name
    return made
