"""An agent with two tools, one of them a search in an index; its first call is forced.

The demo model was never trained on tools. With `tool_parser` they are described to it, and a forced
call is held to the tool's schema while it is written, so that even this model calls correctly.
"""

import asyncio
from typing import Literal

from llama_index.core import Document, VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel

from llm_connectors.llama_index import LocalLLM, configure_settings

NOTES = [
    "The last ferry to the island leaves at 9:30 in the evening.",
    "The museum in the old mill is free on Sundays.",
    "The town library lends bicycles for three euros a day.",
]


class Topic(BaseModel):
    topic: Literal["ferry", "museum", "bicycles"]


async def main() -> None:
    llm = LocalLLM("smollm2-135m", temperature=0.0, max_tokens=96, tool_parser="hermes")
    configure_settings(await llm.aload(), "all-minilm-l6-v2")
    index = VectorStoreIndex.from_documents([Document(text=text) for text in NOTES])

    def search_notes(topic: str) -> str:
        """Search the notes about the town."""
        found = index.as_retriever(similarity_top_k=1).retrieve(topic)
        return found[0].node.get_content()

    def days_until(weekday: str) -> int:
        """Days until a weekday."""
        return {"Saturday": 1, "Sunday": 2}.get(weekday, 3)

    agent = FunctionAgent(
        tools=[
            FunctionTool.from_defaults(search_notes, fn_schema=Topic, return_direct=True),
            FunctionTool.from_defaults(days_until),
        ],
        llm=llm,
        initial_tool_choice="search_notes",
    )
    memory = ChatMemoryBuffer.from_defaults(token_limit=2000)
    handler = agent.run("When does the last ferry leave?", memory=memory)
    async for event in handler.stream_events():
        if isinstance(event, ToolCallResult):
            print(f"{event.tool_name}({event.tool_kwargs}) -> {event.tool_output}")
    print("Answer:", await handler)


asyncio.run(main())
