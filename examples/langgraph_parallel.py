"""A LangGraph graph whose branches run side by side: their calls share one batch."""

import asyncio
import operator
import sys
from typing import Annotated, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.types import Send

from llm_connectors.langchain import ChatLocal

chat = ChatLocal(model="smollm2-135m", temperature=0, max_tokens=24)


class State(TypedDict):
    """What the graph works on."""

    topics: list[str]
    notes: Annotated[list[str], operator.add]


def fan_out(state: State) -> list[Send]:
    """One branch per topic."""
    return [Send("note", {"topic": topic}) for topic in state["topics"]]


async def note(state: dict[str, str]) -> dict[str, list[str]]:
    """One sentence about one topic."""
    answer = await chat.ainvoke(f"Say one sentence about {state['topic']}.")
    return {"notes": [f"{state['topic']}: {answer.content}"]}


async def main(num_topics: int = 12) -> None:
    """Run the graph and show how many branches ran at once."""
    graph = StateGraph(State)
    graph.add_node("note", note)
    graph.add_conditional_edges(START, fan_out, ["note"])
    graph.add_edge("note", END)
    topics = ["rivers", "bees", "maps", "tides", "glass", "bread", "chess", "moss"]
    chosen = [topics[index % len(topics)] for index in range(num_topics)]
    result = await graph.compile().ainvoke({"topics": chosen, "notes": []})
    print("\n".join(result["notes"][:3]))
    print(f"{len(result['notes'])} notes")
    chat.close()


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:2])))
