"""Facts out of free text, as objects: the model cannot write what does not fit the class."""

import asyncio
from enum import Enum
from typing import Literal

from llama_index.core.prompts import PromptTemplate
from pydantic import BaseModel, Field

from llm_connectors.llama_index import LocalLLM


class Day(Enum):
    SATURDAY = "Saturday"
    SUNDAY = "Sunday"


class Event(BaseModel):
    """An event in a town."""

    place: Literal["mill", "harbour", "library"]
    day: Day
    price_euros: int | None = Field(default=None, ge=0, le=999)


TEXTS = [
    "On Sunday there is a concert in the old mill. Tickets are 12 euros.",
    "The flea market opens on Saturday at the harbour.",
    "Come to the library on Saturday: a reading for children, free of charge.",
]
PROMPT = PromptTemplate("Which event does this text announce?\n\n{text}")


async def main() -> None:
    async with LocalLLM("smollm2-135m", temperature=0.0, max_tokens=96) as llm:
        # One schema for all texts: they share the prompt's beginning, and run side by side.
        asked = [llm.astructured_predict(Event, PROMPT, text=text) for text in TEXTS]
        for event in await asyncio.gather(*asked):
            print(event.model_dump(mode="json"))
        async for event in await llm.astream_structured_predict(Event, PROMPT, text=TEXTS[0]):
            print("streamed:", event.model_dump(mode="json"))


asyncio.run(main())
