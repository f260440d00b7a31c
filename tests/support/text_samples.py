"""Texts on which tokenizers disagree, made deterministically, and a strategy for more."""

from __future__ import annotations

import random
import unicodedata

from hypothesis import strategies as st

_ALPHABETS = {
    "letters": "abcXYZ éßñİıſKÅ ǅʰªº",
    "scripts": "日本語한국어עברית مرحبا हिन्दी ไทย ລາວ မြန် Ελλάδα Кириллица ქართული አማርኛ 𝒜𝓑 𐐀𐐨",
    "digits": "0123456789 ٠١٢٣ १२३ ௧௨ ๔๕ ０１ ½¼ ²³ Ⅷⅻ ①⑳ 𝟘𝟙 〇一 \U00011de0\U00016ff4",
    "space": " \t\n\r\v\f\x1c\x1d\x85\xa0\u1680\u2000\u2009\u2028\u2029\u202f\u205f\u3000",
    "newlines": "\n\r \t",
    "marks": "a\u0301e\u0308\u0323ि\u093c\u0e49\u20dd\ufe0f\u0338=>",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪🇺🇸👍🏽☺️❤️‍🔥🫠\u200d\ufe0f",
    "controls": (
        "\x00\x01\x04\x06\x13\x14\x16\x1d\x7f\x80\x9f\xad\u200b\u200e\u202e\u2066\ufeff\ufffe\uffff"
    ),
    "planes": (
        "\ue000\uf8ff\U0001f000\U00020000\U0002ffff"
        "\U00040000\U000a1234\U000e0001\U000f0000\U0010ffff"
    ),
    "punctuation": "!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~«»“”‘’…—–¿¡。、§¶†",
    "contractions": "'s't're've'm'll'd'S'T'RE'VE'M'LL'D'ſ x ’s",
    "recent": "\u1c89\ua7cb\U00010d40\U00011383\U00016d43\U0001ccd6\U00031350\U000105c0\U0001e5d0",
}

_CODE = (
    "def f(x: int) -> str:\n\treturn f'{x:>10}'  # ok\n\n\nclass A(B):\n    y = 0x1F + 1_000\n",
    '<div class="a">&nbsp;<br/></div>\r\n<!-- 1 -->\r\n',
    "SELECT * FROM t WHERE a<>1 AND b='it''s';--x",
    "https://user:pa%20ss@example.co.uk:8080/a/b.html?q=1&r=%E2%82%AC#frag",
    '```json\n{"a": [1, 2.50, -3e10, null, true], "b": "\\u00e9\\n"}\n```',
    '#!/bin/sh\nfor i in $(seq 1 10); do echo "$i"; done || exit 1 && :\n',
    "| a | b |\n|---|:-:|\n| 1 | 2 |\n\n> quote\n\n1. x\n2. y\n",
    "C:\\Users\\me\\file.txt  ~/.bashrc  ../../etc/passwd",
    "\x1b[31mred\x1b[0m 50% off!!! $9.99 €1.234,56 £5 #tag @you me@x.org",
    "int main(void){int a[3]={1,2,3};return a[0]?a[1]:-a[2];}",
    "a+b=c; x**2 != y//3; i++ && --j; p->q; std::vector<int>{}; λx.x ∀∃∈ℝ →⇒",
    "2024-02-29T23:59:59.999Z 12:30pm 1,234,567 1 000 000 3.14159 0b1010 1/2 ½",
)

CONTROL_TOKEN_TEXTS = (
    "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|>", "<|im_end|><|im_end|>", "x<|im_start|>y",
    " <|im_end|> ", "<|im_start|", "|im_end|>", "<<|im_end|>>", "<|im_|im_start|>start|>",
    "<file_sep>a.py", "<s>x</s>", "[INST] x [/INST]", "<think>a</think>",
    "<tool_call>{}</tool_call>",
    "<|begin_of_text|><|eot_id|>", "<empty_output>\n<jupyter_code>1",
    "5<|im_end|>5", "é<|im_end|>\u0338",
)  # fmt: skip


def hostile_texts(seed: int = 0) -> list[str]:
    """More than 700 texts, the same on every run."""
    rng = random.Random(seed)
    texts = ["", *_CODE, *CONTROL_TOKEN_TEXTS]
    for characters in _ALPHABETS.values():
        texts.append(characters)
        texts += [f"a{c}b {c} {c}1{c}{c}\n{c}" for c in characters]
        texts += ["".join(rng.choices(characters, k=rng.randint(2, 40))) for _ in range(12)]
    everything = "".join(_ALPHABETS.values())
    texts += ["".join(rng.choices(everything, k=rng.randint(1, 80))) for _ in range(60)]
    for unit in (
        " ",
        "\n",
        "\t",
        "\r\n",
        "a",
        "é",
        "日",
        "9",
        ".",
        "=",
        "ab",
        " x",
        "a1",
        "'s",
        "👍",
    ):
        texts += [unit * count for count in (1, 2, 3, 4, 7, 8, 15, 31, 64, 257)]
        texts += [f"{unit * 5}1", f"{unit * 5}a", f"1{unit * 5}", f"a{unit * 5}", f"{unit * 3}\n"]
    texts += [form for text in ("Å é ﬁ ① Ω ｶﾞ각", "e\u0301\u0323x") for form in _forms(text)]
    return list(dict.fromkeys(texts))


def _forms(text: str) -> list[str]:
    return [unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC", "NFKD")]


def any_text(max_size: int = 60) -> st.SearchStrategy[str]:
    """Text of any characters, weighted towards those that matter to a split."""
    usual = st.sampled_from("".join(_ALPHABETS.values()))
    character = st.one_of(usual, usual, st.characters(exclude_categories=("Cs",)))
    fragments = st.sampled_from((*CONTROL_TOKEN_TEXTS, " a", "'ll", "  ", "\n\n", "123", "\r\n"))
    part = st.one_of(character, character, fragments)
    return st.lists(part, max_size=max_size).map("".join)
