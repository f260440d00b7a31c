"""GGUF tensor names and layouts, in Hugging Face's terms.

llama.cpp rotates neighbouring pairs of a head's rows (interleaved rope) for the architecture
`llama` and its relatives, so its converter interleaves the two halves of every q and k head.
Hugging Face's `rotate_half` wants the halves one after the other: loading undoes the interleaving.
The other architectures here are stored as Hugging Face stores them. All experts of a layer are one
tensor of three dimensions.

Sources: tensor names from the GGUF specification (ggml-org/ggml, docs/gguf.md) and the `gguf`
package's tensor map; the permutation from `LlamaModel.permute` in llama.cpp's converter.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Final

from engine.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from engine.loader.gguf_architectures import GGUFArchitecture

MODEL_NAMES: Final[Mapping[str, str]] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES: Final[Mapping[str, str]] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONFIG_TENSORS: Final = frozenset(
    {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
)
"""Not weights: they become `rope_parameters` of the config."""

_LAYER_TENSOR: Final = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_MODEL_TENSOR: Final = re.compile(r"(\w+)\.(weight|bias)")
# The rotary frequencies which old converters stored although they follow from the config.
_DERIVED_TENSOR: Final = re.compile(r"blk\.\d+\.(attn_rot_embd|rope_freqs)\.weight")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a file has one of Hugging Face's tensors.

    Attributes:
        name: GGUF's name.
        expert: Which matrix of a tensor that has those of all experts; None for the whole tensor.
    """

    name: str
    expert: int | None = None


def hf_tensors(
    shapes: Mapping[str, Sequence[int]], name: str, architecture: GGUFArchitecture
) -> dict[str, StoredTensor]:
    """Hugging Face name -> where it is, of every weight.

    Args:
        shapes: GGUF name -> shape of every tensor.
        name: The architecture's, for messages.
        architecture: Its row.

    Raises:
        UnsupportedModelError: A tensor has no known meaning. It is not passed over, since a model
            without one of its weights answers, but wrongly.
    """
    names: dict[str, StoredTensor] = {}
    for gguf_name, shape in shapes.items():
        if gguf_name in CONFIG_TENSORS or _DERIVED_TENSOR.fullmatch(gguf_name):
            continue
        hf_name = _hf_tensor_name(gguf_name, architecture)
        if hf_name is None:
            msg = f"GGUF tensor {gguf_name!r} has no known meaning in the architecture {name!r}."
            raise UnsupportedModelError(msg)
        if "*" not in hf_name:
            names[hf_name] = StoredTensor(gguf_name)
            continue
        for expert in range(shape[0]):
            names[hf_name.replace("*", str(expert))] = StoredTensor(gguf_name, expert)
    return names


def _hf_tensor_name(gguf_name: str, architecture: GGUFArchitecture) -> str | None:
    if match := _LAYER_TENSOR.fullmatch(gguf_name):
        layer, module, kind = match.groups()
        stem = architecture.layer_names.get(module, LAYER_NAMES.get(module))
        return stem and f"model.layers.{int(layer)}.{stem}.{kind}"
    if match := _MODEL_TENSOR.fullmatch(gguf_name):
        module, kind = match.groups()
        stem = MODEL_NAMES.get(module)
        return stem and f"{stem}.{kind}"
    return None


def num_interleaved_heads(
    gguf_name: str, architecture: GGUFArchitecture, num_q_heads: int, num_kv_heads: int
) -> int:
    """Heads whose rows this tensor stores interleaved; 0 if they are in Hugging Face's order."""
    if not architecture.is_interleaved:
        return 0
    match = _LAYER_TENSOR.fullmatch(gguf_name)
    module = match.group(2) if match else ""
    return {"attn_q": num_q_heads, "attn_k": num_kv_heads}.get(module, 0)


def interleaved_view(out: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`out` seen so that filling the view in llama.cpp's row order fills `out` in Hugging Face's.

    Row j of half h of a head is row 2j + h of that head in the file.

    Args:
        out: A q or k projection, [num_heads * head_dim, in_features], or its bias,
            [num_heads * head_dim].
        num_heads: That its rows belong to.

    Returns:
        A view: [num_heads, head_dim / 2, 2, in_features], or without the last.

    Raises:
        CheckpointError: The rows are not an even number per head.
    """
    if out.shape[0] % (2 * num_heads):
        msg = f"{out.shape[0]} rows cannot be {num_heads} heads of an even size."
        raise CheckpointError(msg)
    return out.view(num_heads, 2, -1, *out.shape[1:]).transpose(1, 2)
