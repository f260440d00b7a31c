"""What one request costs on the caller's side, in CPU microseconds of the calling thread.

The cases of `frameworks` on a model so small that only the Python around it counts, with answers of
a few tokens. Time of the engine's own thread is not in it. The best of three runs counts. Then what
binding tools costs again, which agents do at every step; the goal is less than 100 µs.
"""

from __future__ import annotations

import timeit

from langchain_core.tools import BaseTool, StructuredTool
from plan import Job, Plan, first_token
from rows import RowFile
from sections.cases import Cases
from sections.frameworks import timed_run
from text_model import text_model, texts_like
from workloads import SHAPES
from workloads import chat as chat_requests

from engine import Engine
from llm_connectors.langchain import ChatLocal

SECTION = "callers"
SHAPE = "tiny"
MAX_TOKENS = 4


def jobs(plan: Plan) -> list[Job]:
    """One job."""
    return [Job(SECTION, "all", {}, ())]


def measure(plan: Plan, rows: RowFile) -> None:
    """Microseconds per request of every case."""
    requests = chat_requests(SHAPES[SHAPE]["vocab_size"], n=16 if plan.is_quick else 1000)
    with plan.make_engine(SHAPE, folder=str(text_model(SHAPE, plan.text_model))) as engine:
        first_token(engine)
        cases = Cases(engine, texts_like(requests, engine.tokenizer), MAX_TOKENS).all()
        for case, (count, run) in cases.items():
            cpu_s = min(timed_run(engine, run, count * MAX_TOKENS)[1] for _ in range(3))
            rows.add(
                SECTION,
                case,
                1e6 * cpu_s / count,
                "µs/request",
                shape=SHAPE,
                requests=count,
            )
        add_bindings(rows, engine)


def add_bindings(rows: RowFile, engine: Engine) -> None:
    """Microseconds of `bind_tools` with tools that were bound before, best of 20 times 50."""
    chat = ChatLocal(engine=engine)
    for count in (1, 10):
        tools = [make_tool(index) for index in range(count)]
        for choice in ("auto", "any"):
            timer = timeit.Timer(lambda t=tools, c=choice: chat.bind_tools(t, tool_choice=c))
            seconds = min(timer.repeat(repeat=20, number=50)) / 50
            rows.add(SECTION, f"bind {count} tools, {choice}", 1e6 * seconds, "µs", shape=SHAPE)


def make_tool(index: int) -> BaseTool:
    """A tool with two arguments."""

    def look_up(city: str, days: int = 1) -> str:
        """Tell the weather of the next days in a city."""
        return f"{city}, {days}"

    return StructuredTool.from_function(look_up, name=f"look_up_{index}")
