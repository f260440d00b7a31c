"""How a family writes a tool call: for prompts that show one and answers forced to one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class CallSyntax:
    """One family's markup around JSON arguments.

    A message with calls is `begin`, the calls parted by `between`, `end`; a call is `before_name`,
    the name, `after_name`, the arguments as a JSON object, `after_arguments`.

    Attributes:
        is_object: A call is a JSON object with "name" and `arguments_key`, alone or in a list,
            between `opener` and `closer`.
        arguments_key: That object's key of the arguments.
        opener: What stands before the JSON.
        closer: What stands behind it.
    """

    before_name: str
    after_name: str
    after_arguments: str
    begin: str = ""
    between: str = "\n"
    end: str = ""
    is_object: bool = True
    arguments_key: str = "arguments"
    opener: str = ""
    closer: str = ""

    @property
    def trigger(self) -> str:
        """What the first call begins with, its name not included."""
        return self.begin + self.before_name

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Calls, given by name and arguments, as the model would write them."""
        written = [
            self.before_name
            + name
            + self.after_name
            + json.dumps(arguments, ensure_ascii=False)
            + self.after_arguments
            for name, arguments in calls
        ]
        return self.begin + self.between.join(written) + self.end


def object_syntax(
    opener: str, closer: str, *, is_list: bool, arguments_key: str = "arguments"
) -> CallSyntax:
    """The syntax of families whose calls are JSON objects between two marks.

    Args:
        opener: Before the calls (a list) or before each call.
        closer: Behind them.
        is_list: All calls stand in one JSON list.
        arguments_key: Key of the arguments.
    """
    before_name, after_name = '{"name": "', f'", "{arguments_key}": '
    if is_list:
        return CallSyntax(
            before_name,
            after_name,
            "}",
            begin=opener + "[",
            between=", ",
            end="]" + closer,
            arguments_key=arguments_key,
            opener=opener,
            closer=closer,
        )
    return CallSyntax(
        opener + before_name,
        after_name,
        "}" + closer,
        arguments_key=arguments_key,
        opener=opener,
        closer=closer,
    )
