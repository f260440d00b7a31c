"""Reasoning and answer in one stream, told apart as they come.

The demo model does not think, so a chat template that opens a <think> block makes it: any text up
to </think> is then its reasoning. With Qwen3, DeepSeek R1 or gpt-oss no template is needed.
"""

from llm_connectors.langchain import ChatLocal

TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
<think>
"""


def main() -> None:
    """Stream blocks: first what the model thinks, then what it says."""
    chat = ChatLocal(model="smollm2-135m", temperature=0, max_tokens=64, chat_template=TEMPLATE)
    # The grammar makes even this model end its thought and give an answer.
    grammar = 'start: THOUGHT "</think>" ANSWER\nTHOUGHT: /[^<]{20,120}/\nANSWER: /[^<]{10,80}/'
    question = "Why is the sky blue?"
    kind = ""
    for event in chat.stream_events(question, version="v3", grammar=grammar):
        if event["event"] != "content-block-delta":
            continue
        delta = event["delta"]
        if delta["type"] != kind:
            kind = delta["type"]
            print(f"\n[{kind}]", end=" ")
        print(delta.get("reasoning") or delta.get("text"), end="", flush=True)
    message = chat.invoke(question, grammar=grammar)
    print("\n\nthought:", message.additional_kwargs["reasoning_content"])
    print("tokens:", message.usage_metadata["output_token_details"])
    chat.close()


if __name__ == "__main__":
    main()
