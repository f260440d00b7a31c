"""What `make demo` shows: a LangChain batch, a streamed answer and a LlamaIndex query.

All three share one engine in this process.
"""

import threading
import time

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from llama_index.core import Document, MockEmbedding, SummaryIndex
from tqdm import tqdm

from engine import Engine
from llm_connectors.langchain import ChatLocal
from llm_connectors.llama_index import LocalLLM, configure_settings

MODEL = "smollm2-135m"
TOPICS = ["rivers", "stars", "bread", "bees", "glass", "tides", "chess", "maps"]
QUESTIONS = [
    "What are {} in one sentence?",
    "Why do people care about {}?",
    "Name one surprising fact about {}.",
    "Who should know about {}?",
    "How would you explain {} to a child?",
    "What is a common mistake about {}?",
    "Where does one learn about {}?",
    "Write a title for a book about {}.",
]
# Long enough to fill a KV block: all requests share its keys and values.
SYSTEM = (
    "You are a friendly teacher who answers questions of curious people. Answer in one or two "
    "short sentences, in plain words that a ten-year-old understands. Be exact: say only what you "
    "know, never make up names or numbers, and say so when you do not know something. Do not "
    "repeat the question, do not use lists, and do not say that you are a computer program."
)
INPUTS = [{"question": question.format(topic)} for topic in TOPICS for question in QUESTIONS]


def show_progress(engine: Engine, done: threading.Event, num_requests: int) -> None:
    """A bar over finished requests with the engine's current tokens per second."""
    before = engine.stats().requests_finished
    with tqdm(total=num_requests, unit="request", dynamic_ncols=True) as bar:
        while not done.is_set() or bar.n < num_requests:
            stats = engine.stats()
            bar.set_postfix_str(f"{stats.tokens_per_s:.0f} tokens/s, {stats.running} running")
            bar.update(stats.requests_finished - before - bar.n)
            if done.wait(0.1) and engine.stats().requests_finished - before >= num_requests:
                bar.update(num_requests - bar.n)


engine = Engine.shared(MODEL)
chat = ChatLocal(model=MODEL, temperature=0.0, max_tokens=48)
prompt = ChatPromptTemplate.from_messages([("system", SYSTEM), ("human", "{question}")])
chain = prompt | chat | StrOutputParser()

print(f"\n1. LangChain: {len(INPUTS)} different questions in one chain.batch(...)\n")
done = threading.Event()
bar = threading.Thread(target=show_progress, args=(engine, done, len(INPUTS)))
bar.start()
started_s = time.monotonic()
answers = chain.batch(INPUTS)
batch_s = time.monotonic() - started_s
done.set()
bar.join()
for row, answer in list(zip(INPUTS, answers, strict=True))[::13]:
    print(f"\nQ: {row['question']}\nA: {answer.strip()}")

print("\n2. LangChain: one streamed answer\n")
for piece in chain.stream({"question": "Tell me a very short story about a bee."}):
    print(piece, end="", flush=True)

print("\n\n3. LlamaIndex: a query over three documents\n")
llm = LocalLLM(model=MODEL, temperature=0.0, max_tokens=64)
configure_settings(llm, embed=MockEmbedding(embed_dim=1))  # a summary index needs no embeddings
index = SummaryIndex.from_documents(
    [
        Document(text="The harbour café opens at seven. Its speciality is cinnamon rolls."),
        Document(text="The museum in the old mill is free on Sundays."),
        Document(text="The last ferry to the island leaves at 9:30 pm from pier four."),
    ]
)
print(index.as_query_engine(llm=llm).query("When does the last ferry to the island leave?"))

stats = engine.stats()
rows = [
    ("requests", f"{stats.requests_finished}"),
    ("peak batch", f"{stats.peak_running}"),
    ("prompt tokens", f"{stats.prompt_tokens}"),
    ("output tokens", f"{stats.output_tokens}"),
    ("prefix-cache hits", f"{stats.prefix_hit_tokens} tokens ({stats.prefix_hit_rate:.0%})"),
    ("batch tokens/s", f"{sum(len(chat.get_token_ids(a)) for a in answers) / batch_s:.0f}"),
]
print("\n" + "\n".join(f"{name:18} {value:>22}" for name, value in rows))
engine.close()
