"""Read fields out of 100 documents in one batch: every answer fits the schema."""

import sys

from pydantic import BaseModel, Field

from llm_connectors.langchain import ChatLocal

NAMES = ["Ada", "Grace", "Alan", "Edsger", "Barbara", "Donald", "Margaret", "Dennis"]


class Person(BaseModel):
    """A person that a document is about."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)


def main(num_documents: int = 100) -> None:
    """Extract a `Person` from each document and print a few."""
    chat = ChatLocal(model="smollm2-135m", temperature=0, max_tokens=48)
    reader = chat.with_structured_output(Person, include_raw=True)
    documents = [
        f"Write the name and age as JSON. {NAMES[index % len(NAMES)]} turned {20 + index % 60}."
        for index in range(num_documents)
    ]
    # One list is one batch on the engine, also with include_raw.
    results = reader.batch(documents)
    people = [result["parsed"] for result in results]
    assert all(isinstance(person, Person) for person in people)
    tokens = sum(result["raw"].usage_metadata["output_tokens"] for result in results)
    for document, person in list(zip(documents, people, strict=True))[:3]:
        print(f"{document!r} -> {person!r}")
    print(f"{len(people)} documents, {tokens} tokens, all in the schema")
    chat.close()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
