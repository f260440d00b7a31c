"""Prompts equal transformers' `apply_chat_template`, text and ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from text_chat_templates import CHATS, TEMPLATES, WEATHER_TOOL
from text_tokenizers import (
    demo_gguf_metadata,
    demo_oracle,
    trained_byte_level,
    trained_sentencepiece_like,
    write_folder,
)
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from engine.errors import RequestError
from engine.text.chat_template import ChatTemplate
from engine.text.tokenizer import Tokenizer

KINDS = ("qwen2", "llama3", "marked", "first word marked")
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]")
# What transformers gives to templates as it is, before 5.21: a content of None, one name for
# reasoning. The engine does what later ones do, whichever is installed.
CHANGED = {"tool turns", "reasoning"} - (
    set(CHATS) if hasattr(chat_template_utils, "_alias_reasoning_fields") else set()
)
Pair = tuple[Tokenizer, PreTrainedTokenizerFast]


def backend_of(kind: str) -> tokenizers.Tokenizer:
    if kind not in ("marked", "first word marked"):
        return trained_byte_level(kind)
    backend = tokenizers.Tokenizer.from_str(trained_sentencepiece_like().to_str())
    backend.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in CONTROL])
    backend.post_processor = None
    if kind == "first word marked":
        backend.normalizer = None
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
            prepend_scheme="first", split=False
        )
    return backend


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    folder: Path = tmp_path_factory.mktemp("chat")
    write_folder(folder, backend_of(request.param), **names)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **names)
    return Tokenizer.from_folder(folder), theirs


def their_answer(theirs: PreTrainedTokenizerFast, source: str, chat: Any, **options: Any) -> Any:
    """(text, ids), or the exception."""
    try:
        return tuple(
            theirs.apply_chat_template(
                chat, chat_template=source, tokenize=tokenize, return_dict=False, **options
            )
            for tokenize in (False, True)
        )
    except Exception as error:
        return error


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "options",
    [
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
    ],
    ids=["generation", "closed", "continued"],
)
def test_messages(pair: Pair, name: str, chat: str, options: dict[str, Any]) -> None:
    if chat in CHANGED and chat == "tool turns" and name in ("gemma", "plain"):
        pytest.skip("needs transformers 5.21, which prepares such messages for templates")
    tokenizer, theirs = pair
    expected = their_answer(theirs, TEMPLATES[name], CHATS[chat], **options)
    template = ChatTemplate(TEMPLATES[name], tokenizer)
    if isinstance(expected, Exception):
        with pytest.raises(RequestError):
            template.render(CHATS[chat], **options)
        with pytest.raises(RequestError):
            template.encode(CHATS[chat], **options)
        return
    text, ids = expected
    assert template.render(CHATS[chat], **options) == text
    assert template.encode(CHATS[chat], **options) == ids


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
@pytest.mark.parametrize("chat", CHATS)
def test_tools(pair: Pair, name: str, chat: str) -> None:
    tokenizer, theirs = pair
    options: dict[str, Any] = {"tools": [WEATHER_TOOL], "add_generation_prompt": True}
    text, ids = their_answer(theirs, TEMPLATES[name], CHATS[chat], **options)
    template = ChatTemplate(TEMPLATES[name], tokenizer)
    assert template.render(CHATS[chat], **options) == text
    assert template.encode(CHATS[chat], **options) == ids
    assert "get_weather" in text


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3", {"enable_thinking": False}),
        ("llama3", {"date_string": "01 Jan 2030"}),
        ("mistral", {"eos_token": "[/INST]"}),
        ("plain", {"documents": [{"title": "T", "text": "one\ntwo"}, {"title": "", "text": "é"}]}),
    ],
)
def test_variables(pair: Pair, name: str, options: dict[str, Any]) -> None:
    tokenizer, theirs = pair
    chat = CHATS["three turns"]
    text, ids = their_answer(theirs, TEMPLATES[name], chat, add_generation_prompt=True, **options)
    template = ChatTemplate(TEMPLATES[name], tokenizer)
    assert template.render(chat, **options) == text
    assert template.encode(chat, **options) == ids
    assert text != template.render(chat)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | tojson }}",
        "{{ messages | tojson(indent=2) }}",
        "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}",
        "{{ messages | tojson(ensure_ascii=true) }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
        "{% if ns.n == 2 %}{% break %}{% endif %}{% endfor %}",
        "{{ dict(a=1, b='x') | tojson }} {{ dict.fromkeys(['q']) | tojson }}",
        "{%- for m in messages -%}\n  {{ m.role.upper() }}\n{%- endfor %}\n",
        "  {% if true %}\n  x\n  {% endif %}\n{{ strftime_now('%Y') }}\n\n",
        "{{ messages[0].nothing }}|{{ undefined_name }}|{{ messages[0].nothing is defined }}",
        "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(messages[0].content) }}",
        "{{ messages[-1]['content'].split(' ')[0] | replace('a', 'b') | safe }}",
        "{% generation %}{% set x = 1 %}{{ messages[0].content }}{% endgeneration %}{{ x }}",
    ],
)
def test_dialect(pair: Pair, source: str) -> None:
    tokenizer, theirs = pair
    for chat in (CHATS[name] for name in CHATS.keys() - CHANGED):
        expected = their_answer(theirs, source, chat)
        assert not isinstance(expected, Exception), expected
        template = ChatTemplate(source, tokenizer)
        assert template.render(chat, add_generation_prompt=False) == expected[0]
        assert template.encode(chat, add_generation_prompt=False) == expected[1]


@pytest.mark.demo_model
@pytest.mark.parametrize("chat", ["one turn", "with system", "three turns", "reasoning"])
def test_demo_model(chat: str) -> None:
    tokenizer = Tokenizer.from_gguf_metadata(demo_gguf_metadata())
    assert tokenizer.chat_template is not None
    template = ChatTemplate(tokenizer.chat_template, tokenizer)
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=demo_oracle(), bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    demo_oracle().encode_special_tokens = False
    text, ids = their_answer(
        theirs, tokenizer.chat_template, CHATS[chat], add_generation_prompt=True
    )
    assert template.render(CHATS[chat]) == text
    assert template.encode(CHATS[chat]) == ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", ["[/INST]", " a [/INST].b", "x\n[/INST][/INST]", "é [/INST"])
def test_a_control_token_in_a_message_reads_like_no_token(
    kind: str, content: str, tmp_path: Path
) -> None:
    """The ids are those of a tokenizer that never heard of the control token in question."""
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    backend = backend_of(kind)
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path / "all", backend, **names))
    whole = json.loads(backend.to_str())
    whole["added_tokens"] = [t for t in whole["added_tokens"] if t["content"] in CONTROL[:-1]]
    innocent = tokenizers.Tokenizer.from_str(json.dumps(whole))
    write_folder(tmp_path / "fewer", innocent)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "fewer" / "tokenizer.json"), **names
    )
    chat = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": f"no {content}"},
        {"role": "user", "content": "ok"},
    ]
    for source in (TEMPLATES["chatml"], TEMPLATES["gemma"], TEMPLATES["plain"]):
        text, ids = their_answer(theirs, source, chat, add_generation_prompt=True)
        template = ChatTemplate(source, tokenizer)
        assert template.render(chat) == text
        assert template.encode(chat) == ids
