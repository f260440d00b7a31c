"""Attention of transformers' models over our KV cache.

A model of transformers calls, in each layer, the function that its config names. Ours is registered
under a name that nobody else uses, once per process, and finds out from the calling module which
engine's step is running: no global or thread-local state is involved, so models of several engines
and models of the application run side by side.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from engine.errors import UnsupportedModelError
from engine.kernels import dispatch
from engine.kernels.kv_cache import KVCache
from engine.kernels.metadata import AttentionMetadata

if TYPE_CHECKING:
    from torch import nn

ATTENTION_NAME = "llm_connectors_paged"
_OWNER = "_llm_connectors_step"
_IGNORED = frozenset(
    {
        "dropout",
        "is_causal",
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "layer_idx",
        "logits_to_keep",
        "layer_head_mask",
        "position_embeddings",
        "past_key_values",
        "target_dtype",
        "implementation",
    }
)
"""Arguments that change nothing here: what they carry, the engine knows or does not use."""
_register_lock = threading.Lock()


@dataclass(frozen=True)
class LayerHeads:
    """Heads of one call of attention: their numbers, sizes of keys and of values, its window."""

    num_q_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None

    @property
    def head_dim(self) -> int:
        """Of the KV cache: the larger of both, the smaller is padded with zeros."""
        return max(self.key_dim, self.value_dim)


@dataclass
class RunningStep:
    """What a model's attention needs to know of the step that runs; one per model.

    Attributes:
        dtype: Of the model, in which queries, keys and values come to the cache.
        kv_caches: Caches of the layers, in the order in which they call.
        metadata: Layout of the batch; None while the layers are only looked at.
        next_layer: Calls so far in this forward.
        heads: What the layers were seen to have.
    """

    dtype: torch.dtype
    kv_caches: Sequence[KVCache] = ()
    metadata: AttentionMetadata | None = None
    next_layer: int = 0
    heads: list[LayerHeads] = field(default_factory=list)

    def begin(
        self,
        kv_caches: Sequence[KVCache] = (),
        metadata: AttentionMetadata | None = None,
    ) -> None:
        """A forward starts."""
        self.kv_caches, self.metadata, self.next_layer = kv_caches, metadata, 0
        if metadata is None:
            self.heads = []


def adopt(model: nn.Module, dtype: torch.dtype) -> RunningStep:
    """Let the modules of `model` find its running step; registers our function at first use."""
    from transformers import AttentionInterface

    with _register_lock:
        if ATTENTION_NAME not in AttentionInterface():
            AttentionInterface.register(ATTENTION_NAME, paged_attention_of_module)
    step = RunningStep(dtype)
    for module in model.modules():
        module.__dict__[_OWNER] = step
    return step


def paged_attention_of_module(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' attention functions: (mixed values [1, T, Hq, D], no weights).

    Args:
        module: Of the model that calls; it knows its running step.
        query: [1, Hq, T, D].
        key: [1, Hkv, T, D].
        value: [1, Hkv, T, Dv].
        attention_mask: Must be None: what tokens see follows from the batch's layout.
        scaling: Factor of the scores; None for D ** -0.5.
        sliding_window: Tokens a position sees; None or 0 for all.
        softcap: Bound of the scores; None or 0 for none.
        s_aux: [Hq], sinks.
        others: Checked by name.

    Raises:
        UnsupportedModelError: The model asks for something that our attention does not do.
    """
    step: RunningStep | None = module.__dict__.get(_OWNER)
    if step is None:
        msg = (
            f"Attention {ATTENTION_NAME!r} belongs to engines. Give your own model another "
            "attn_implementation, such as 'sdpa'."
        )
        raise UnsupportedModelError(msg)
    name = type(module).__name__
    unknown = {key for key, value in others.items() if value is not None} - _IGNORED
    if unknown:
        msg = f"{name} calls attention with {', '.join(sorted(unknown))}, which is not supported."
        raise UnsupportedModelError(msg)
    if attention_mask is not None:
        msg = f"{name} makes an attention mask of its own (such as alibi), which is not supported."
        raise UnsupportedModelError(msg)
    if not others.get("is_causal", getattr(module, "is_causal", True)):
        msg = f"{name} looks ahead: its attention is not causal."
        raise UnsupportedModelError(msg)
    _, num_q_heads, num_tokens, key_dim = query.shape
    num_kv_heads, value_dim = key.shape[1], value.shape[-1]
    window = sliding_window or None
    scale = key_dim**-0.5 if scaling is None else scaling
    if step.metadata is None:
        heads = LayerHeads(num_q_heads, num_kv_heads, key_dim, value_dim, window)
        step.heads.append(heads)
        # Only sizes are looked at: any mixture of the values will do.
        mixed = value.repeat_interleave(num_q_heads // num_kv_heads, dim=1)
        return mixed.transpose(1, 2).contiguous(), None

    if step.next_layer == len(step.kv_caches):
        msg = f"{name} calls attention more often than {len(step.kv_caches)} times in a forward."
        raise UnsupportedModelError(msg)
    k_cache, v_cache = step.kv_caches[step.next_layer]
    step.next_layer += 1
    head_dim = k_cache.shape[-1]
    parts = [
        F.pad(part[0].transpose(0, 1), (0, head_dim - part.shape[-1]))
        for part in (query, key, value)
    ]
    q = dispatch.rope_write_kv(
        torch.cat(parts, dim=1).flatten(1).to(step.dtype),
        step.metadata,
        None,
        k_cache,
        v_cache,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )
    mixed = dispatch.paged_attention(
        q,
        k_cache,
        v_cache,
        step.metadata,
        softmax_scale=scale,
        sliding_window=window,
        logit_softcap=softcap or 0.0,
        sinks=s_aux,
    )
    mixed = mixed.view(1, num_tokens, num_q_heads, head_dim)[..., :value_dim]
    return mixed.to(query.dtype), None
