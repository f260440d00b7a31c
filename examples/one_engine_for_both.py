"""LangChain and LlamaIndex in one process, on one copy of the weights."""

import asyncio

from llama_index.core.llms import ChatMessage

from engine import Engine
from llm_connectors.langchain import ChatLocal
from llm_connectors.llama_index import LocalLLM

MODEL = "smollm2-135m"


async def main() -> None:
    chat = ChatLocal(model=MODEL, temperature=0.0, max_tokens=32)
    llm = LocalLLM(MODEL, temperature=0.0, max_tokens=32)
    await llm.aload()

    # Both frameworks' requests run in the same batch.
    lc_answers, li_answers = await asyncio.gather(
        chat.abatch([f"What is the capital of {name}?" for name in ("Japan", "Egypt", "Peru")]),
        llm.abatch_chat(
            [[ChatMessage(f"What is {sum_}?")] for sum_ in ("2 + 2", "3 + 4", "5 + 5")]
        ),
    )
    for message in lc_answers:
        print("LangChain: ", message.content)
    for response in li_answers:
        print("LlamaIndex:", response.message.content)

    engine = Engine.shared(MODEL)
    assert llm.engine is engine
    stats = engine.stats()
    print(f"\none engine: {stats.weight_bytes / 2**20:.0f} MiB of weights,")
    print(f"{stats.peak_running} requests at once, {stats.requests_finished} in all,")
    print(f"{stats.tokens_per_s:.0f} tokens/s, prefix hits {stats.prefix_hit_rate:.0%}")
    engine.close()
    chat.close()
    llm.close()


asyncio.run(main())
