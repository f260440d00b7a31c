"""`ChatTemplate`: a list of messages to the prompt the model was trained on."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.meta

from engine.errors import ConfigError, RequestError, nearest_name_hint
from engine.text.added_tokens import any_of
from engine.text.chat_messages import plain_data, plain_messages
from engine.text.control_token_guard import ControlTokenCover, ControlTokenGuard
from engine.text.jinja_environment import TemplateRefusal, chat_environment
from engine.text.tokenizer import Tokenizer, check_encodable

_OWN_VARIABLES = frozenset(("messages", "tools", "documents", "add_generation_prompt"))


class ChatTemplate:
    """Renders chats like transformers' `apply_chat_template`, with three differences.

    Control tokens inside messages, tools, documents and variables stay text; the prompt begins
    with exactly one BOS if the tokenizer adds one, whether or not the template writes it; and what
    a template would ignore (tools, documents, unknown variables) is an error.

    Immutable; any thread may use it. Templates are compiled on first use.

    Args:
        source: Jinja source, or several by name ("default", and "tool_use" for chats with tools);
            None for a model that has none, so that any use raises.
        tokenizer: Of the model.
    """

    def __init__(self, source: str | Mapping[str, str] | None, tokenizer: Tokenizer) -> None:
        if isinstance(source, str):
            source = {"default": source}
        self._sources: dict[str, str] = dict(source or {})
        self._tokenizer = tokenizer
        self._guard = ControlTokenGuard(tokenizer.special_tokens)
        self._control_tokens = any_of(tokenizer.special_tokens)
        self._by_content = {token.content: token for token in tokenizer.added_tokens}

    @functools.cached_property
    def variables(self) -> frozenset[str]:
        """Names the templates read that a caller can set, such as `enable_thinking`."""
        names: set[str] = set()
        for source in self._sources.values():
            names |= _variables(source)
        return frozenset(names - _OWN_VARIABLES)

    @property
    def all_sources(self) -> str:
        """The Jinja sources, one after the other: what a template's marks are looked for in."""
        return "\n".join(self._sources.values())

    @functools.cached_property
    def supports_tools(self) -> bool:
        """Whether tools passed to `render` show in the prompt."""
        name = "probe_tool_name"
        parameters = {"type": "object", "properties": {}, "required": []}
        function = {"name": name, "description": "A probe.", "parameters": parameters}
        tool = {"type": "function", "function": function}
        return self._shows(name, [{"role": "user", "content": "Hi"}], tools=[tool])

    @functools.cached_property
    def supports_system_role(self) -> bool:
        """Whether a system message shows in the prompt. Gemma's template refuses it."""
        chat = [
            {"role": "system", "content": "probe of the system role"},
            {"role": "user", "content": "Hi"},
        ]
        return self._shows("probe of the system role", chat)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> str:
        """The prompt as text.

        Args:
            messages: Dicts with "role" (system, user, assistant, tool, developer) and "content" (a
                string, or text blocks, which are joined). "developer" becomes "system" where the
                template does not know it.
            tools: JSON schemas of functions the model may call.
            add_generation_prompt: End with the start of an assistant's answer. Default: yes, unless
                the final message is continued.
            continue_final_message: End inside the final message, for the model to go on with it.
            documents: Dicts with "title" and "text", for templates that take them.
            template_kwargs: Further variables of the template (see `variables`). One named like a
                control token of the tokenizer, such as `bos_token`, takes its place.

        Raises:
            RequestError: There is no template, a message is malformed (its index is named), the
                template refuses the messages, or it has no use for an argument.
            ConfigError: The template itself is broken.
        """
        cover = self._guard.cover()
        rendered = self._rendered(
            cover,
            messages,
            tools,
            add_generation_prompt,
            continue_final_message,
            documents,
            template_kwargs,
        )
        return cover.reveal(rendered)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> list[int]:
        """The prompt as token ids; arguments and errors are those of `render`."""
        return self.encode_batch(
            [messages],
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            documents=documents,
            **template_kwargs,
        )[0]

    def encode_batch(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> list[list[int]]:
        """`encode` of each conversation, encoded together, which is faster than one by one.

        Raises:
            RequestError: As `encode`; a note says which conversation it was.
        """
        covers = [self._guard.cover() for _ in conversations]
        rendered: list[str] = []
        for cover, messages in zip(covers, conversations, strict=True):
            try:
                text = self._rendered(
                    cover,
                    messages,
                    tools,
                    add_generation_prompt,
                    continue_final_message,
                    documents,
                    template_kwargs,
                )
                check_encodable(text)
            except RequestError as error:
                if len(conversations) > 1:
                    error.add_note(
                        f"This was conversation {len(rendered)} of {len(conversations)}."
                    )
                raise
            rendered.append(text)
        is_covered = [
            cover.is_needed_in(text) for cover, text in zip(covers, rendered, strict=True)
        ]
        as_it_is = iter(
            self._tokenizer.encode_batch(
                [text for text, covered in zip(rendered, is_covered, strict=True) if not covered],
                add_special_tokens=False,
                parse_special=True,
            )
        )
        return [
            self._tokenizer.with_added_bos(
                self._encode_covered(text, cover) if covered else next(as_it_is)
            )
            for text, cover, covered in zip(rendered, covers, is_covered, strict=True)
        ]

    def _rendered(
        self,
        cover: ControlTokenCover,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool | None,
        continue_final_message: bool,
        documents: Sequence[Mapping[str, Any]] | None,
        template_kwargs: Mapping[str, Any],
    ) -> str:
        """The prompt as text with the caller's control tokens under `cover`."""
        if add_generation_prompt and continue_final_message:
            raise RequestError(
                "add_generation_prompt starts a new message and continue_final_message goes on "
                "with the last one. Choose one."
            )
        source = self._source(with_tools=bool(tools))
        chat = [_covered_message(message, cover) for message in plain_messages(messages)]
        self._fit_developer_role(chat)
        values: dict[str, Any] = {
            "tools": self._covered_dicts("tools", tools, source, cover),
            "documents": self._covered_dicts("documents", documents, source, cover),
            **self._tokenizer.special_token_map,
            **self._covered_kwargs(template_kwargs, cover),
        }
        if not continue_final_message:
            generation = add_generation_prompt is None or add_generation_prompt
            return _run(source, messages=chat, add_generation_prompt=generation, **values)
        mark = cover.unused_text() + " "
        content = _mark_final_message(chat, mark)
        rendered = _run(source, messages=chat, add_generation_prompt=False, **values)
        return _cut_at_mark(rendered, content, mark)

    def _source(self, *, with_tools: bool) -> str:
        if with_tools and "tool_use" in self._sources:
            return self._sources["tool_use"]
        if "default" not in self._sources:
            named = f" under the name 'default' (only {', '.join(self._sources)})"
            msg = (
                f"This model has no chat template{named if self._sources else ''}. Pass the Jinja "
                "source as `chat_template`, or send the prompt as text."
            )
            raise RequestError(msg)
        return self._sources["default"]

    def _fit_developer_role(self, chat: list[dict[str, Any]]) -> None:
        developer = [index for index, message in enumerate(chat) if message["role"] == "developer"]
        if not developer or any("developer" in source for source in self._sources.values()):
            return
        if not self.supports_system_role:
            msg = (
                f"messages[{developer[0]}] has the role 'developer', but this model's chat "
                "template takes neither that nor 'system'. Put the text in a user message."
            )
            raise RequestError(msg)
        for index in developer:
            chat[index]["role"] = "system"

    def _covered_dicts(
        self,
        name: str,
        values: Sequence[Mapping[str, Any]] | None,
        source: str,
        cover: ControlTokenCover,
    ) -> Any:
        """`values` (tools or documents) for the template; None for none."""
        if not values:
            return None
        if isinstance(values, str | Mapping) or not all(isinstance(v, Mapping) for v in values):
            msg = f"{name} must be a list of dicts."
            raise RequestError(msg)
        if name not in _variables(source):
            msg = f"This model's chat template has no place for {name}. Put them in a message."
            raise RequestError(msg)
        return cover.hide(plain_data(list(values), name))

    def _covered_kwargs(self, kwargs: Mapping[str, Any], cover: ControlTokenCover) -> Any:
        for name in kwargs:
            if name not in self.variables:
                known = ", ".join(sorted(self.variables)) or "none"
                msg = (
                    f"This model's chat template does not read {name!r} (it reads: {known})."
                    f"{nearest_name_hint(name, self.variables)}"
                )
                raise RequestError(msg)
        plain = plain_data(dict(kwargs), "template_kwargs")
        return {
            name: value if name in self._tokenizer.special_token_map else cover.hide(value)
            for name, value in plain.items()
        }

    def _encode_covered(self, rendered: str, cover: ControlTokenCover) -> list[int]:
        """Ids of a prompt under cover: the control tokens in sight are the template's own."""
        token_ids: list[int] = []
        start, strip_left = 0, False
        matches = self._control_tokens.finditer(rendered) if self._control_tokens else ()
        for match in matches:
            token = self._by_content[match.group()]
            text = rendered[start : match.start()]
            self._extend(token_ids, text, cover, start, strip_left, token.lstrip)
            token_ids.append(token.token_id)
            start, strip_left = match.end(), token.rstrip
        self._extend(token_ids, rendered[start:], cover, start, strip_left, False)
        return token_ids

    def _extend(
        self,
        token_ids: list[int],
        text: str,
        cover: ControlTokenCover,
        start: int,
        strip_left: bool,
        strip_right: bool,
    ) -> None:
        text = cover.reveal(text)
        if strip_left:
            text = text.lstrip()
        if strip_right:
            text = text.rstrip()
        if text:
            token_ids += self._tokenizer.encode_text_part(text, is_first=start == 0)

    def _shows(self, text: str, chat: list[dict[str, Any]], **values: Any) -> bool:
        if not self._sources:
            return False
        try:
            return text in self.render(chat, **values)
        except RequestError:
            return False


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    try:
        return chat_environment().from_string(source)
    except jinja2.exceptions.TemplateSyntaxError as error:
        msg = f"The chat template does not compile: {error} (line {error.lineno})."
        raise ConfigError(msg) from error


@functools.lru_cache(maxsize=64)
def _variables(source: str) -> frozenset[str]:
    """Names `source` reads without setting them."""
    _compiled(source)
    environment = chat_environment()
    names = jinja2.meta.find_undeclared_variables(environment.parse(source))
    return frozenset(names - environment.globals.keys())


def _run(source: str, **values: Any) -> str:
    template = _compiled(source)
    try:
        return template.render(**values)
    except TemplateRefusal as error:
        msg = f"The chat template refuses these messages: {error}"
        raise RequestError(msg) from error
    except jinja2.exceptions.SecurityError as error:
        msg = f"The chat template does what templates may not: {error}"
        raise ConfigError(msg) from error
    except Exception as error:  # Template code can fail in every way Python code can.
        msg = f"The chat template fails on these messages: {type(error).__name__}: {error}"
        raise RequestError(msg) from error


def _covered_message(message: dict[str, Any], cover: ControlTokenCover) -> dict[str, Any]:
    # The role is one of a fixed list, and templates build control tokens from it.
    return {**cover.hide(message), "role": message["role"]}


def _mark_final_message(chat: list[dict[str, Any]], mark: str) -> str:
    """Put `mark` behind the final message's content, which is returned as it was."""
    content: str | None = chat[-1].get("content")
    if content is None:
        msg = f"messages[{len(chat) - 1}] has no content that could be continued."
        raise RequestError(msg)
    chat[-1]["content"] = content + mark
    return content


def _cut_at_mark(rendered: str, content: str, mark: str) -> str:
    """What stands before `mark`. Its final space shows whether the template trims content."""
    place = rendered.rfind(mark.rstrip())
    if place < 0 or content.strip() not in rendered:
        raise RequestError(
            "The final message cannot be continued: the chat template leaves it out or alters it."
        )
    kept = rendered[:place]
    return kept if rendered[place : place + len(mark)] == mark else kept.rstrip()
