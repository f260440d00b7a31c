"""An async web application in the manner of FastAPI: every request handler shares one engine.

With FastAPI, `lifespan` goes into `FastAPI(lifespan=lifespan)` and the handlers get `@app.post`;
`StreamingResponse(story(...))` sends the pieces as they come. Here they are called directly.
"""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator

from pydantic import BaseModel, Field

from llm_connectors.langchain import ChatLocal

chat = ChatLocal(model="smollm2-135m", temperature=0, max_tokens=32, timeout=120)


class Rating(BaseModel):
    """How a reader likes a text."""

    stars: int = Field(ge=1, le=5)
    reason: str = Field(max_length=40)


@contextlib.asynccontextmanager
async def lifespan(app: object) -> AsyncIterator[None]:
    """Load the model before the first request and free it after the last."""
    await chat.aload()
    yield
    chat.close()


async def ask(question: str) -> str:
    """`POST /ask`: one answer. A client that leaves cancels it, and with it the request."""
    return (await chat.ainvoke(question)).text


async def rate(text: str) -> Rating:
    """`POST /rate`: an answer that fits its response model."""
    model = chat.with_structured_output(Rating)
    return await model.ainvoke(f"Rate this text: {text}")


async def story(topic: str) -> AsyncIterator[str]:
    """`GET /story`: pieces as they come."""
    async for chunk in chat.astream(f"Tell a story about {topic}."):
        yield chunk.text


async def main(num_clients: int = 16) -> None:
    """Many clients at once, as a server would see them."""
    async with lifespan(None):
        answers, rating = await asyncio.gather(
            asyncio.gather(*(ask(f"What is {n} plus {n}?") for n in range(num_clients))),
            rate("The sea was calm."),
        )
        print(len(answers), "answers, the first:", answers[0])
        print(rating)
        async for piece in story("a ferry"):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:2])))
