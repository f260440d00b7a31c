"""Messages and completion prompts -> the token ids the model sees, with exactly one BOS.

    chat(messages)                  chat template -> ids
    complete(prompt)                a model with a template: one user message, as a chat
                                    a base model: BOS and the text
    complete(prompt, formatted)     a model with a template: the text alone, markup parsed
                                    a base model: one BOS, added if the text brings none

A `messages_to_prompt` or `completion_to_prompt` given by the user takes the template's place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.llms.llm import default_completion_to_prompt

from llm_connectors._answer_plan import AnswerPlan, AnswerStream
from llm_connectors._schema import schema_text
from llm_connectors.llama_index.errors import ContextOverflowError, RequestError
from llm_connectors.llama_index.messages import template_messages

if TYPE_CHECKING:
    from engine import Engine, SamplingParams
    from llm_connectors.llama_index.options import RequestOptions


@dataclass(frozen=True, slots=True)
class PreparedPrompts:
    """The prompts of one call, ready to submit.

    Attributes:
        prompt_ids: Token ids of each.
        params: For all.
        plan: Reads the answers; None where they are text as they stand.
    """

    prompt_ids: list[list[int]]
    params: SamplingParams
    plan: AnswerPlan | None = None

    def readers(self) -> list[AnswerStream | None]:
        """What parts each answer into reasoning, text and calls; None for plain text."""
        if self.plan is None:
            return [None] * len(self.prompt_ids)
        return [self.plan.stream(ids) for ids in self.prompt_ids]


@dataclass(frozen=True, slots=True)
class PromptBuilder:
    """Turns one call's input into token ids. Made per call; thread-safe.

    Attributes:
        engine: Whose tokenizer and template are used.
        options: What the call asks for.
        messages_to_prompt: The user's function, or LlamaIndex's generic one.
        completion_to_prompt: The user's function, or LlamaIndex's identity.
    """

    engine: Engine
    options: RequestOptions
    messages_to_prompt: Callable[[Sequence[ChatMessage]], str]
    completion_to_prompt: Callable[[str], str]

    @property
    def has_template(self) -> bool:
        """True where messages go through a chat template."""
        return self.options.chat_template is not None or self.engine.has_chat_template

    def chats(self, conversations: Sequence[Sequence[ChatMessage]]) -> PreparedPrompts:
        """Conversations, ready for the assistant's turn; rendered and encoded together.

        Raises:
            RequestError: Messages are malformed or refused by the template, or there are tools
                and no template that could show them.
        """
        dicts = [template_messages(messages) for messages in conversations]
        plan = self.chat_plan()
        if plan is not None:
            return PreparedPrompts(plan.encode(dicts), plan.params, plan)
        if self.messages_to_prompt is not generic_messages:
            texts = [self.messages_to_prompt(messages) for messages in conversations]
            return self._plain([self._with_one_bos(text) for text in texts])
        texts = [generic_messages(messages) for messages in conversations]
        return self._plain([self.engine.tokenize(text) for text in texts])

    def chat_plan(self) -> AnswerPlan | None:
        """How conversations go through a chat template; None where they do not.

        Raises:
            RequestError: The model cannot do what the call asks for.
        """
        if self.messages_to_prompt is not generic_messages or not self.has_template:
            return None
        return AnswerPlan(self.engine, self.options.answer, self.options.params)

    def completions(self, prompts: Sequence[str], *, formatted: bool) -> PreparedPrompts:
        """Completion prompts; `formatted` text is used as it stands."""
        for prompt in prompts:
            if not isinstance(prompt, str):
                msg = f"prompt is a {type(prompt).__name__}, not a string."
                raise RequestError(msg)
        request = self.options.answer.request
        if request is not None and request.tools:
            msg = "complete() takes no tools: a completion has no place for calls. Use chat()."
            raise RequestError(msg)
        if not formatted and self.completion_to_prompt is default_completion_to_prompt:
            if self.has_template:
                return self.chats([[ChatMessage(content=prompt)] for prompt in prompts])
            return self._plain([self.engine.tokenize(prompt) for prompt in prompts])
        if not formatted:
            prompts = [self.completion_to_prompt(prompt) for prompt in prompts]
        elif self.has_template:
            return self._plain(
                [
                    self.engine.tokenize(prompt, add_special_tokens=False, parse_special=True)
                    for prompt in prompts
                ]
            )
        return self._plain([self._with_one_bos(prompt) for prompt in prompts])

    def _plain(self, prompt_ids: list[list[int]]) -> PreparedPrompts:
        """Prompts that no template made, so that no markup is looked for in their answers."""
        request, params = self.options.answer.request, self.options.params
        if request is not None and request.tools:
            msg = (
                "Tools are shown by a chat template, and this prompt goes through none. Pass "
                "chat_template=..., and leave messages_to_prompt out."
            )
            raise RequestError(msg)
        if request is not None and request.answer_schema is not None:
            schema = schema_text(request.answer_schema, "The schema of response_format")
            params = params.replace(json_schema=schema)
        return PreparedPrompts(prompt_ids, params)

    def _with_one_bos(self, text: str) -> list[int]:
        """Ids of marked-up text. The tokenizer's BOS is added unless the text starts with it."""
        plain = self.engine.tokenize(text, add_special_tokens=False, parse_special=True)
        added = self.engine.tokenize("")
        return plain if plain[: len(added)] == added else [*added, *plain]


def fit_window(prompt_ids: list[int], params: SamplingParams, window: int | None) -> SamplingParams:
    """Hold a request to the `context_window` set on the model object, if one is set.

    The engine checks its own limit when the request is submitted; this one is smaller.

    Returns:
        `params`, with `max_tokens=None` turned into what the window leaves.

    Raises:
        ContextOverflowError: Prompt and answer together do not fit.
    """
    if window is None:
        return params
    wanted = len(prompt_ids) + (params.max_tokens or 1)
    if wanted > window:
        msg = (
            f"The prompt has {len(prompt_ids)} tokens and max_tokens={params.max_tokens}: together "
            f"more than context_window={window}. Shorten the prompt, lower max_tokens, or raise "
            "context_window."
        )
        raise ContextOverflowError(msg)
    if params.max_tokens is None:
        return params.replace(max_tokens=window - len(prompt_ids))
    return params
