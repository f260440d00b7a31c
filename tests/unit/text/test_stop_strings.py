"""The stop string matcher against a plain search of the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import RequestError
from engine.text.detokenizer import StopStringMatcher


def whole_text_search(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    """Character by character: the first end of a stop string, the longest of those."""
    for end in range(1, len(text) + 1):
        ending_here = [stop for stop in stops if text[:end].endswith(stop)]
        if ending_here:
            stop = max(ending_here, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


def streamed(parts: list[str], stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    matcher = StopStringMatcher(stops, include_stop)
    shown, matched = "", None
    for part in parts:
        safe, matched = matcher.push(part)
        shown += safe
        assert matcher.matched == matched
    return shown + matcher.flush(), matched


small_text = st.text("ab\nc", max_size=40)
small_stops = st.lists(st.text("ab\nc", min_size=1, max_size=5), max_size=5)


@settings(max_examples=1000, deadline=None)
@given(parts=st.lists(small_text, max_size=12), stops=small_stops, include_stop=st.booleans())
def test_any_split_gives_the_whole_text_result(
    parts: list[str], stops: list[str], include_stop: bool
) -> None:
    expected = whole_text_search("".join(parts), stops, include_stop)
    assert streamed(parts, stops, include_stop) == expected


@settings(max_examples=500, deadline=None)
@given(text=small_text, stops=small_stops)
def test_nothing_is_shown_that_may_become_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopStringMatcher(stops)
    shown = ""
    for position, character in enumerate(text):
        safe, matched = matcher.push(character)
        shown += safe
        if matched:
            break
        held = text[len(shown) : position + 1]
        # Held back is the longest end that begins a stop string, and no more.
        seen = text[: position + 1]
        longest = max(
            (n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])), default=0
        )
        assert len(held) == longest


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("ab\n\ncd", ["\n", "\n\n"], ("ab", "\n")),
        ("abcd", ["abcd", "bc"], ("a", "bc")),
        ("xabc", ["abc", "bc", "c"], ("x", "abc")),
        ("aaab", ["aab"], ("a", "aab")),
        ("ababac", ["abac"], ("ab", "abac")),
        ("END", ["END"], ("", "END")),
        ("EN", ["END"], ("EN", None)),
        ("héllo 👍🏽!", ["👍🏽"], ("héllo ", "👍🏽")),
        ("anything", [], ("anything", None)),
    ],
)
def test_cases(text: str, stops: list[str], expected: tuple[str, str | None]) -> None:
    assert streamed([text], stops, False) == expected
    assert streamed(list(text), stops, False) == expected


def test_text_after_the_match_is_dropped() -> None:
    matcher = StopStringMatcher(["stop"], include_stop=True)
    assert matcher.push("a st") == ("a ", None)
    assert matcher.push("op b") == ("stop", "stop")
    assert matcher.push("more stop") == ("", "stop")
    assert matcher.flush() == ""


def test_flush_gives_back_what_was_held() -> None:
    matcher = StopStringMatcher(["</answer>"])
    assert matcher.push("x </ans") == ("x ", None)
    assert matcher.flush() == "</ans"
    assert matcher.flush() == ""


def test_empty_stop_is_refused() -> None:
    with pytest.raises(RequestError, match="empty"):
        StopStringMatcher(["a", ""])
