"""Tokens as they come: from a chat model, through a chain, and with the counts at the end."""

from langchain_core.output_parsers import StrOutputParser

from llm_connectors.langchain import ChatLocal

chat = ChatLocal(model="smollm2-135m", temperature=0.7, seed=1, max_tokens=40)

whole = None
for chunk in chat.stream("Why is the sky blue?"):
    print(chunk.content, end="", flush=True)
    whole = chunk if whole is None else whole + chunk
print()
assert whole is not None
print(whole.response_metadata["finish_reason"], whole.usage_metadata)

# Streams pass through chains that can pass them on.
for text in (chat | StrOutputParser()).stream("Name a colour.", stop=["."], max_tokens=16):
    print(text, end="|", flush=True)
print()

# Leaving the loop ends the request: nothing goes on generating in the background.
for count, chunk in enumerate(chat.stream("Count from one to a thousand.")):
    print(chunk.content, end="", flush=True)
    if count == 10:
        break
print(" …")

chat.close()
