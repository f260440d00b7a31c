"""Every way of calling a LangChain model, under one signature, and handlers that count."""

import asyncio
from collections import Counter

from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler


def _invoke(model, text, **kwargs):
    return [model.invoke(text, **kwargs)]


def _ainvoke(model, text, **kwargs):
    return [asyncio.run(model.ainvoke(text, **kwargs))]


def _stream(model, text, **kwargs):
    return list(model.stream(text, **kwargs))


def _astream(model, text, **kwargs):
    async def collect():
        return [chunk async for chunk in model.astream(text, **kwargs)]

    return asyncio.run(collect())


def _batch(model, text, **kwargs):
    return model.batch([text, text], **kwargs)


def _batch_as_completed(model, text, **kwargs):
    return [answer for _index, answer in model.batch_as_completed([text, text], **kwargs)]


def _abatch(model, text, **kwargs):
    return asyncio.run(model.abatch([text, text], **kwargs))


def _abatch_as_completed(model, text, **kwargs):
    async def collect():
        pairs = model.abatch_as_completed([text, text], **kwargs)
        return [answer async for _index, answer in pairs]

    return asyncio.run(collect())


def _generate(model, text, **kwargs):
    prompt = model._convert_input(text)
    return model.generate_prompt([prompt, prompt], **kwargs).generations


def _agenerate(model, text, **kwargs):
    prompt = model._convert_input(text)
    return asyncio.run(model.agenerate_prompt([prompt, prompt], **kwargs)).generations


VERBS = {
    "invoke": _invoke,
    "ainvoke": _ainvoke,
    "stream": _stream,
    "astream": _astream,
    "batch": _batch,
    "batch_as_completed": _batch_as_completed,
    "abatch": _abatch,
    "abatch_as_completed": _abatch_as_completed,
    "generate": _generate,
    "agenerate": _agenerate,
}


class CountingHandler(BaseCallbackHandler):
    """Counts the callbacks of each run."""

    def __init__(self):
        self.counts = Counter()
        self.errors = []
        self.started = []
        self.ended = []

    def on_chat_model_start(self, serialized, messages, *, run_id, **kwargs):
        self.counts["start"] += 1
        self.started.append(run_id)

    def on_llm_start(self, serialized, prompts, *, run_id, **kwargs):
        self.counts["start"] += 1
        self.started.append(run_id)

    def on_llm_new_token(self, token, **kwargs):
        self.counts["token"] += 1

    def on_llm_end(self, response, *, run_id, **kwargs):
        self.counts["end"] += 1
        self.ended.append(run_id)

    def on_llm_error(self, error, *, run_id, **kwargs):
        self.counts["error"] += 1
        self.errors.append(error)
        self.ended.append(run_id)


class AsyncCountingHandler(AsyncCallbackHandler):
    """The same for async calls."""

    def __init__(self):
        self.counts = Counter()

    async def on_chat_model_start(self, serialized, messages, **kwargs):
        self.counts["start"] += 1

    async def on_llm_start(self, serialized, prompts, **kwargs):
        self.counts["start"] += 1

    async def on_llm_new_token(self, token, **kwargs):
        self.counts["token"] += 1

    async def on_llm_end(self, response, **kwargs):
        self.counts["end"] += 1

    async def on_llm_error(self, error, **kwargs):
        self.counts["error"] += 1
