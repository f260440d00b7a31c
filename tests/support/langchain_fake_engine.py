"""A deterministic stand-in for `engine.Engine`: same face, real handles, no model.

A token is a character. The answer to a prompt is its text reversed, one token a step, so that every
test can say what it expects; "_" is a token without text. A thread runs the steps; `step_s` slows
them down, `gate` stops them. Prompts that say REFUSE are refused at submit, FAIL fails later.

`answer_with` makes it answer otherwise, and `template` is the source whose marks decide how answers
are read.
"""

import itertools
import threading
import time
from types import SimpleNamespace

from engine import (
    CompletionOutput,
    ContextOverflowError,
    Delta,
    EngineClosedError,
    EngineConfig,
    Logprob,
    RequestError,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    Usage,
)
from engine.handle import RequestHandle, wake_loops
from engine.text.answer_format import AnswerFormat


class FakeRequest:
    def __init__(self, request_id, prompt, ids, params, submit_options, answer_with):
        self.request_id = request_id
        self.prompt = prompt
        self.ids = ids
        self.params = params
        self.submit_options = submit_options
        text = "".join(map(chr, ids))
        self.error = None
        if "FAIL" in text:
            self.error = RequestError("The prompt says FAIL.")
        self.answer = text[::-1] if answer_with is None else answer_with(text)
        self.is_scripted = answer_with is not None
        self.position = 0
        self.is_aborted = False
        self.metrics = RequestMetrics(arrival_s=time.monotonic())
        self.finish_reason = None
        self.stop_reason = None
        self.text = ""

    def step(self):
        """Grow by one character; the new text."""
        if self.metrics.first_token_s is None:
            self.metrics.first_scheduled_s = self.metrics.first_token_s = time.monotonic()
        new = self.answer[self.position : self.position + 1]
        if not self.is_scripted:
            new = new.replace("_", "")
        self.position += 1
        self.text += new
        for stop in self.params.stop or ():
            if self.text.endswith(stop):
                self.finish_reason, self.stop_reason = "stop", stop
                new = new[: len(new) - len(stop)] if len(stop) <= len(new) else ""
                self.text = self.text[: -len(stop)]
        limit = self.params.max_tokens
        if self.finish_reason is None and self.position >= len(self.answer):
            self.finish_reason = "stop"
        if self.finish_reason is None and limit is not None and self.position >= limit:
            self.finish_reason = "length"
        return new


class FakeEngine:
    """The part of `Engine` that connectors use."""

    def __init__(
        self,
        model="fake-model",
        *,
        step_s=0.0,
        max_model_len=10_000,
        template="",
        shows_tools=True,
        special_tokens=(),
        **options,
    ):
        self.template = SimpleNamespace(
            all_sources=template,
            supports_tools=shows_tools,
            supports_system_role=True,
            render=lambda messages, **variables: messages[-1]["content"],
            variables=frozenset(
                name for name in ("enable_thinking", "reasoning_effort") if name in template
            ),
        )
        self.tokenizer = SimpleNamespace(special_tokens=special_tokens)
        self.resolved_config = SimpleNamespace(block_size=16, enable_prefix_caching=True)
        self.answer_with = None
        self.config = EngineConfig.from_kwargs(model=model, **options)
        self.model_name = model
        self.max_model_len = max_model_len
        self.has_chat_template = True
        self.is_closed = False
        self.num_closes = 0
        self.gate = threading.Event()
        self.gate.set()
        self.step_s = step_s
        self.requests: list[FakeRequest] = []
        self.aborted: list[str] = []
        self.hand_overs: list[int] = []
        self.peak_running = 0
        self._running: list[tuple[FakeRequest, RequestHandle]] = []
        self._condition = threading.Condition()
        self._ids = itertools.count()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # ---- text

    def tokenize(self, text, *, add_special_tokens=True, parse_special=False):
        return [1] * add_special_tokens + [ord(one) for one in text]

    def detokenize(self, token_ids, *, skip_special_tokens=True):
        return "".join(map(chr, token_ids))

    def apply_chat_template(
        self,
        messages,
        *,
        tools=None,
        add_generation_prompt=True,
        continue_final_message=False,
        chat_template=None,
        **template_kwargs,
    ):
        self.last_render = SimpleNamespace(
            messages=messages,
            tools=tools,
            chat_template=chat_template,
            template_kwargs=template_kwargs,
            thread=threading.current_thread(),
        )
        return [ord(one) for message in messages for one in message["content"]]

    def answer_format(self, chat_template=None, tool_parser="auto", reasoning_parser="auto"):
        return AnswerFormat(
            self.template, tool_parser=tool_parser, reasoning_parser=reasoning_parser
        )

    def apply_chat_template_batch(self, conversations, **options):
        return [self.apply_chat_template(messages, **options) for messages in conversations]

    # ---- requests

    def submit(self, prompt, params=None, **submit_options):
        return self._submit([prompt], params, submit_options)[0]

    def submit_many(self, prompts, params=None, **submit_options):
        return self._submit(prompts, params, submit_options)

    def _submit(self, prompts, params, submit_options):
        each = params if isinstance(params, list) else [params] * len(prompts)
        assert all(isinstance(one, SamplingParams) for one in each)
        if self.is_closed:
            raise EngineClosedError("The engine is closed.")
        pairs = []
        for prompt, params in zip(prompts, each, strict=True):
            ids = [ord(one) for one in prompt] if isinstance(prompt, str) else prompt
            text = prompt if isinstance(prompt, str) else None
            request = FakeRequest(
                f"fake-{next(self._ids)}", text, ids, params, submit_options, self.answer_with
            )
            if len(ids) > self.max_model_len:
                raise ContextOverflowError(f"{len(ids)} tokens > {self.max_model_len}.")
            if "REFUSE" in "".join(map(chr, ids)):
                raise RequestError("The prompt says REFUSE.")
            pairs.append((request, RequestHandle(request, self._abort, lambda request: None)))
        with self._condition:
            self.requests += [request for request, _handle in pairs]
            self.hand_overs.append(len(pairs))
            self._running += pairs
            self._condition.notify_all()
        return [handle for _request, handle in pairs]

    def _abort(self, request):
        with self._condition:
            if not request.is_aborted and request.finish_reason is None:
                request.is_aborted = True
                self.aborted.append(request.request_id)
            self._condition.notify_all()

    def _run(self):
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._running or self.is_closed)
                if self.is_closed and not self._running:
                    return
                running = list(self._running)
                self.peak_running = max(self.peak_running, len(running))
            if not self.gate.wait(0.001):
                # Held, but aborts get through, as in a real engine between two steps.
                running = [pair for pair in running if pair[0].is_aborted]
            elif self.step_s:
                time.sleep(self.step_s)
            futures = []
            for request, handle in running:
                futures += self._advance(request, handle)
            with self._condition:
                self._running = [pair for pair in self._running if not pair[1].is_done]
            wake_loops(futures)

    def _advance(self, request, handle):
        if request.error is not None:
            return handle.publish(error=request.error)
        new = ""
        if request.is_aborted:
            request.finish_reason = "abort"
        else:
            new = request.step()
        ids = [ord(one) for one in new]
        delta = Delta(0, new, ids, logprobs=self._logprobs(request, ids))
        if request.finish_reason is None:
            return handle.publish(deltas=[delta])
        request.metrics.finished_s = time.monotonic()
        output = self._output(request)
        delta.finish_reason = request.finish_reason
        delta.stop_reason = request.stop_reason
        delta.usage, delta.metrics = output.usage, output.metrics
        return handle.publish(deltas=[delta], output=output)

    def _output(self, request):
        ids = [ord(one) for one in request.text]
        answers = [
            CompletionOutput(
                index=index,
                text=request.text,
                token_ids=ids,
                finish_reason=request.finish_reason,
                stop_reason=request.stop_reason,
                logprobs=self._logprobs(request, ids),
            )
            for index in range(request.params.n)
        ]
        prompt_logprobs = None
        if request.params.prompt_logprobs is not None:
            prompt_logprobs = [
                None,
                *({one: Logprob(-1.0, 1, chr(one))} for one in request.ids[1:]),
            ]
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.ids,
            outputs=answers,
            usage=Usage(len(request.ids), request.position * request.params.n, cached_tokens=2),
            metrics=request.metrics,
            prompt_logprobs=prompt_logprobs,
        )

    def _logprobs(self, request, ids):
        if request.params.logprobs is None:
            return None
        # The sampled token is second; "?" is likelier everywhere.
        return [{63: Logprob(-0.5, 1, "?"), one: Logprob(-1.0, 2, chr(one))} for one in ids]

    # ---- life

    def close(self, *, drain=True, timeout=None):
        self.num_closes += 1
        with self._condition:
            self.is_closed = True
            self._condition.notify_all()


class FakeShared:
    """`Engine.shared` over fakes: counts loads and references."""

    def __init__(self):
        self.loads = []
        self.references = {}
        self.load_s = 0.0
        self.error = None
        self.lock = threading.Lock()

    def shared(self, model, **options):
        with self.lock:
            if self.error is not None:
                raise self.error
            config = EngineConfig.from_kwargs(model=model, **options)
            loaded = self.references.get(config)
            if loaded is None or loaded[0].is_closed:
                time.sleep(self.load_s)
                self.loads.append(config)
                fake = FakeEngine(model, **options)
                close = fake.close

                def give_back(**how):
                    loaded = self.references[config]
                    loaded[1] -= 1
                    if loaded[1] == 0:
                        close(**how)

                fake.close = give_back
                self.references[config] = loaded = [fake, 0]
            loaded[1] += 1
            return loaded[0]
