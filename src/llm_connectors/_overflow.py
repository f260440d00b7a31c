"""What becomes of prompts that are too long for the context: an error, or the oldest part goes.

Left out is what came first, never without having been asked for: `on_overflow="truncate_left"`. Of
a conversation whole turns go, a turn being a user's message and all that follows until the next
one, so that no tool result loses its call; system messages at the start stay. Of a plain text
tokens go, but not those that the tokenizer puts before every text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine import RequestError
from llm_connectors._params import DEFAULT_MAX_TOKENS

if TYPE_CHECKING:
    from engine import Engine

OVERFLOW_POLICIES = ("error", "truncate_left")

Conversation = Sequence[Mapping[str, Any]]


def check_overflow_policy(policy: Any) -> None:
    """Refuse what is not one of `OVERFLOW_POLICIES`.

    Raises:
        RequestError: It is none.
    """
    if policy not in OVERFLOW_POLICIES:
        msg = f"on_overflow={policy!r} must be one of {', '.join(OVERFLOW_POLICIES)}."
        raise RequestError(msg)


def prompt_room(engine: Engine, max_tokens: int | None) -> int:
    """Prompt tokens that leave room for the answer, for 512 tokens where `max_tokens` is None."""
    return engine.max_model_len - (DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens)


def shortened_conversation(
    messages: Conversation, room: int, encode: Callable[[Conversation], list[int]]
) -> list[int]:
    """The token ids of `messages` without its oldest turns, as few of them as need be.

    Args:
        messages: A conversation that is too long.
        room: Tokens there may be.
        encode: Makes a prompt.

    Returns:
        A prompt of at most `room` tokens, or that of the last turn alone, for the engine to refuse.
    """
    num_system = 0
    while num_system < len(messages) and messages[num_system]["role"] in ("system", "developer"):
        num_system += 1
    starts = [
        index
        for index, message in enumerate(messages)
        if index > num_system and message["role"] == "user"
    ]
    low, high = 0, len(starts)
    shortest: list[int] | None = None
    while low < high:
        middle = (low + high) // 2
        prompt = encode([*messages[:num_system], *messages[starts[middle] :]])
        if len(prompt) <= room:
            shortest, high = prompt, middle
        else:
            low = middle + 1
    if shortest is not None:
        return shortest
    return encode([*messages[:num_system], *messages[starts[-1] if starts else num_system :]])


def shortened_text(engine: Engine, text: str, room: int, *, parse_special: bool) -> str | list[int]:
    """`text`, or where it has more than `room` tokens the last of them behind the usual first ones.

    Args:
        engine: Its tokenizer counts.
        text: A prompt.
        room: Tokens there may be; where it leaves none, `text` is for the engine to refuse.
        parse_special: Read control tokens in `text` as such.
    """
    usual = engine.tokenize("", parse_special=parse_special)
    num_kept = room - len(usual)
    # No tokenizer makes more tokens than the text has bytes.
    if num_kept < 1 or 4 * len(text) <= num_kept:
        return text
    token_ids = engine.tokenize(text, parse_special=parse_special)
    return token_ids if len(token_ids) <= room else usual + token_ids[-num_kept:]
