"""A tool-calling loop: the model must call a tool, the tool runs, the model answers.

The demo model is too small to decide by itself when to call a tool, so its first step is forced;
with a tool-tuned model, `langchain.agents.create_agent(ChatLocal(…), tools)` does all of this.
"""

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool

from llm_connectors.langchain import ChatLocal

WEATHER = {"Oslo": "fog, 4 degrees", "Rome": "sun, 19 degrees"}


@tool
def get_weather(city: str) -> str:
    """Tell the weather in a city."""
    return WEATHER.get(city, "unknown")


def main() -> None:
    """One question, one call, one answer, all streamed."""
    chat = ChatLocal(model="smollm2-135m", temperature=0, max_tokens=48)
    messages = [HumanMessage("What is the weather in Oslo?")]

    # A forced call is held to the tool's schema; its arguments stream as they come.
    call = None
    for chunk in chat.bind_tools([get_weather], tool_choice="any").stream(messages):
        for piece in chunk.tool_call_chunks:
            print(piece["name"] or "", piece["args"] or "", sep="", end="")
        call = chunk if call is None else call + chunk
    print()
    messages.append(call)
    for one in call.tool_calls:
        messages.append(get_weather.invoke(one))
        print("tool:", messages[-1].content)

    for chunk in chat.stream(messages):
        print(chunk.content, end="", flush=True)
    print()
    chat.close()


if __name__ == "__main__":
    main()
