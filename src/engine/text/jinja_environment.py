"""The Jinja dialect in which chat templates are written: that of transformers, sandboxed."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what a model is trained on: here, its body."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way of declaring tags

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _RestrictedNamespace(jinja2.utils.Namespace):
    """`namespace()` that cannot hold underscored names: no way towards Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # `self` stays free as a name that a template may use.
        self, *positional = args
        attributes = dict(*positional, **kwargs)
        for name in attributes:
            _refuse_underscored(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscored(name)
        super().__setitem__(name, value)


def _refuse_underscored(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        msg = f"a namespace cannot hold the underscored name {name!r}"
        raise jinja2.exceptions.SecurityError(msg)


class _DictFunction:
    """`dict()` without the class behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class TemplateRefusal(jinja2.exceptions.TemplateError):
    """A template called `raise_exception`: it does not want these messages."""


def _raise_exception(message: object) -> str:
    raise TemplateRefusal(str(message))


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter escapes `<`, `>` and `&` for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.cache
def chat_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment all chat templates share; compiling and rendering do not alter it."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _DictFunction(),
        "namespace": _RestrictedNamespace,
    }
    environment.globals.update(functions)
    return environment
