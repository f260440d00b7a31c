"""Many concurrent calls from one event loop: each is a task, all share one batch."""

import asyncio
import time

from llm_connectors.langchain import ChatLocal, LocalLLM


async def main() -> None:
    """Ask several questions at once, then stream one answer beside another call."""
    # Loading happens in a worker thread: the event loop stays free.
    chat = await ChatLocal(model="smollm2-135m", temperature=0, max_tokens=24).aload()
    # The same model: the engine is shared, no second copy of the weights.
    llm = LocalLLM(model="smollm2-135m", temperature=0, max_tokens=16)

    countries = ["France", "Italy", "Japan", "Egypt", "Peru", "Norway"]
    started_s = time.monotonic()
    answers = await asyncio.gather(
        *(chat.ainvoke(f"What is the capital of {country}?") for country in countries)
    )
    for country, answer in zip(countries, answers, strict=True):
        print(f"{country}: {answer.content}")
    print(f"{len(countries)} answers in {time.monotonic() - started_s:.1f} s")

    completion = asyncio.create_task(llm.ainvoke("The three primary colours are"))
    async for chunk in chat.astream("Tell me about the sea in one sentence."):
        print(chunk.content, end="", flush=True)
    print("\n---", await completion)

    # A cancelled task aborts its request, and the engine's memory is free again.
    story = asyncio.create_task(chat.ainvoke("Tell me a long story.", max_tokens=500))
    await asyncio.sleep(0.2)
    story.cancel()
    await asyncio.gather(story, return_exceptions=True)
    print("cancelled:", story.cancelled())

    llm.close()
    chat.close()


asyncio.run(main())
