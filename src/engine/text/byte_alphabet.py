"""The alphabet in which byte-level BPE vocabularies spell bytes as printable characters.

GPT-2 (openai/gpt-2, `encoder.py`) writes every token as text in which each of the 256 bytes is one
printable character: printable Latin-1 stands for itself, the other 68 bytes are U+0100 and up.
"""

from __future__ import annotations

_SELF_SPELLED = frozenset((*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)))


def _byte_to_char() -> dict[int, str]:
    others = (byte for byte in range(256) if byte not in _SELF_SPELLED)
    spelled = {byte: chr(0x100 + index) for index, byte in enumerate(others)}
    return {byte: spelled.get(byte, chr(byte)) for byte in range(256)}


BYTE_TO_CHAR = _byte_to_char()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def spelled_bytes(token: str) -> bytes | None:
    """The bytes that `token` spells, or None if it holds a character outside the alphabet."""
    try:
        return bytes([CHAR_TO_BYTE[char] for char in token])
    except KeyError:
        return None
