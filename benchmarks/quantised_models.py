"""The demo model in any quantised format, for the section `quantised`.

    python benchmarks/quantised_models.py FORMAT FOLDER

Matrices of the layers are stored in the format (see `quantised_formats`), the rest in bfloat16, and
the tokenizer beside them. "bfloat16" stores everything so; "gguf" is the file as it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from quantised_formats import FORMATS
from safetensors.torch import save_file
from text_model import write_tokenizer

from engine.loader.checkpoint import open_checkpoint
from engine.loader.resolve import resolve_model

DEMO_MODEL = "smollm2-135m"


def demo_weights() -> dict[str, torch.Tensor]:
    """The demo model's weights by Hugging Face name, float32."""
    files = resolve_model(DEMO_MODEL, local_files_only=True)
    weights = {}
    with open_checkpoint(files) as checkpoint:
        for name, shape in (checkpoint.names() or {}).items():
            weights[name] = torch.empty(shape)
            checkpoint.read_into(name, weights[name])
    return weights


def write_demo(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Write the demo model in a format; returns the numbers that are stored, float32."""
    kind = FORMATS.get(name)
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, torch.Tensor] = {}
    for key, weight in demo_weights().items():
        if kind is None or not key.endswith("_proj.weight"):
            tensors[key] = weight.bfloat16()
            numbers[key] = tensors[key].float()
            continue
        written, numbers[key] = kind.write(weight)
        module = key.removesuffix(".weight")
        tensors |= {module + ending: value for ending, value in written.items()}
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(resolve_model(DEMO_MODEL, local_files_only=True).config)
    config |= {"dtype": "bfloat16"}
    if kind is not None:
        config["quantization_config"] = kind.config
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    write_tokenizer(folder)
    return numbers


if __name__ == "__main__":
    write_demo(Path(sys.argv[2]), sys.argv[1])
