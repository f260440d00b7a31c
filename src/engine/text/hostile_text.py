"""Short texts on which tokenizers that look alike differ: a smoke test when one is loaded."""

from __future__ import annotations

HOSTILE_TEXTS: tuple[str, ...] = (
    "Hello, world! It's 3 o'clock; we'll see, they'RE DONE'S.", " leading", "trailing ",
    "  42", "a  1", "a\n    1", "\r\n9", "\t\t7 8\n", "1 234,567.89e-10",
    "def f(x):\n    return x**2  # square\n\n\n", "a\r\n\r\nb", " \n \n ", "\n\n\n\nx",
    "   \u3000 x", "½ ² Ⅷ ٣٤٥ १२३ ௧ 𝟘𝟙 ①②", " ½", "x ٣", "naïve café ÅNGSTRÖM ẞtraße",
    "e\u0301 a\u0308\u0323 ﬁ", "日本語テキスト 混ざる한국어",
    "שלום עולם مرحبا", "हिन्दी ไทย ລາວ မြန်မာ",
    "👩‍👩‍👧‍👦 🇩🇪🏳️‍🌈 👍🏽 ☺️", "\x00\x01\x04..\x04.\x06 \x7f\x85\u2028\u2029",
    "\u200b\u200d\ufeff\u00ad zero", "https://example.com/a?b=c&d=%20#e_f",
    "{\"k\": [1, 2.5, null]}", "```py\nx\n```", "----====////", "'s 'S 'ſ 'll 'LL' \u2019s",
    "DON'T don't Don'T", "CamelCaseHTMLParser ǅ ʰa", "<|im_start|>user",
    "\U000a0000\U000f0000\U0010ffff \ue000", "\U00011de0  \U00016ff4 a\U00011f50", "a" * 300,
    " " * 70, "\n" * 40 + " " * 40, "ab1" * 60, "!?" * 80,
    "\U0001e030\U00011383\U00031350 \u1c89x",
)  # fmt: skip
