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

from llm_connectors.llama_index.errors import ContextOverflowError, RequestError
from llm_connectors.llama_index.messages import template_messages

if TYPE_CHECKING:
    from engine import Engine, SamplingParams


@dataclass(frozen=True, slots=True)
class PromptBuilder:
    """Turns one call's input into token ids. Made per call; thread-safe.

    Attributes:
        engine: Whose tokenizer and template are used.
        chat_template: Jinja source instead of the model's own.
        messages_to_prompt: The user's function, or LlamaIndex's generic one.
        completion_to_prompt: The user's function, or LlamaIndex's identity.
    """

    engine: Engine
    chat_template: str | None
    messages_to_prompt: Callable[[Sequence[ChatMessage]], str]
    completion_to_prompt: Callable[[str], str]

    @property
    def has_template(self) -> bool:
        """True where messages go through a chat template."""
        return self.chat_template is not None or self.engine.has_chat_template

    def chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn."""
        dicts = template_messages(messages)
        if self.messages_to_prompt is not generic_messages:
            return self._with_one_bos(self.messages_to_prompt(messages))
        if self.has_template:
            return self.engine.apply_chat_template(dicts, chat_template=self.chat_template)
        return self.engine.tokenize(generic_messages(messages))

    def chats(self, conversations: Sequence[Sequence[ChatMessage]]) -> list[list[int]]:
        """`chat` of each conversation, rendered and encoded together."""
        is_plain = self.messages_to_prompt is generic_messages and self.has_template
        if len(conversations) < 2 or not is_plain:
            return [self.chat(messages) for messages in conversations]
        return self.engine.apply_chat_template_batch(
            [template_messages(messages) for messages in conversations],
            chat_template=self.chat_template,
        )

    def completion(self, prompt: str, *, formatted: bool) -> list[int]:
        """Token ids of a completion prompt; `formatted` text is used as it stands."""
        if not isinstance(prompt, str):
            msg = f"prompt is a {type(prompt).__name__}, not a string."
            raise RequestError(msg)
        if formatted:
            if self.has_template:
                return self.engine.tokenize(prompt, add_special_tokens=False, parse_special=True)
            return self._with_one_bos(prompt)
        if self.completion_to_prompt is not default_completion_to_prompt:
            return self._with_one_bos(self.completion_to_prompt(prompt))
        if self.has_template:
            return self.chat([ChatMessage(content=prompt)])
        return self.engine.tokenize(prompt)

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
