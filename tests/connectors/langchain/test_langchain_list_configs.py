"""The configs of a list call's items are LangChain's own, made once where they are equal."""

import uuid

import pytest
from langchain_core.runnables import RunnableLambda
from langchain_core.runnables.config import get_config_list

from llm_connectors.langchain._list_call import configs_of_items

RUN_ID = uuid.UUID(int=7)


@pytest.mark.parametrize("num_items", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "config",
    [None, {}, {"tags": ["a"], "metadata": {"k": 1}, "max_concurrency": 3}, {"run_id": None}],
)
def test_they_are_equal_to_langchains(config, num_items):
    assert configs_of_items(config, num_items) == get_config_list(config, num_items)


def test_a_run_id_is_the_first_items_alone():
    with pytest.warns(RuntimeWarning, match="run_id"):
        found = configs_of_items({"run_id": RUN_ID}, 3)
    assert [one.get("run_id") for one in found] == [RUN_ID, None, None]


def test_lists_stay_lists_and_wrong_lengths_are_refused():
    found = configs_of_items([{"tags": ["a"]}, {"tags": ["b"]}], 2)
    assert [one["tags"] for one in found] == [["a"], ["b"]]
    with pytest.raises(ValueError, match="config"):
        configs_of_items([{}], 2)


def test_a_surrounding_chains_config_reaches_every_item():
    seen = []

    def look(_):
        seen.extend(one["metadata"] for one in configs_of_items(None, 2))

    RunnableLambda(look).invoke("x", {"metadata": {"thread": 1}})
    assert seen == [{"thread": 1}] * 2
