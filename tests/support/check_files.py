"""Refuse files that do not belong in the repository: weights, large files, private keys.

python tests/support/check_files.py FILE...
"""

from __future__ import annotations

import sys
from pathlib import Path

MAX_BYTES = 512 * 1024
WEIGHT_SUFFIXES = {".gguf", ".safetensors", ".bin", ".pt", ".pth", ".onnx"}
KEY_MARKS = (b"-----BEGIN " + b"RSA PRIVATE KEY", b"-----BEGIN " + b"OPENSSH PRIVATE KEY")


def problem_with(path: Path) -> str | None:
    """Why `path` must not be committed, or None."""
    if path.suffix in WEIGHT_SUFFIXES:
        return f"{path}: model weights are never committed"
    size = path.stat().st_size
    if size > MAX_BYTES:
        return f"{path}: {size} bytes, the limit is {MAX_BYTES}"
    content = path.read_bytes()
    if any(mark in content for mark in KEY_MARKS):
        return f"{path}: contains a private key"
    return None


def main(arguments: list[str]) -> int:
    """Check the files and print what is wrong with them."""
    problems = [problem_with(Path(name)) for name in arguments if Path(name).is_file()]
    found = [problem for problem in problems if problem]
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
