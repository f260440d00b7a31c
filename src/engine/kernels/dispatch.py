"""The ops that layers call. CPU tensors take the torch path, CUDA tensors the Triton kernels.

Every op here has the same name and arguments in `reference`, which states its formula.
"""

from __future__ import annotations

from engine.kernels import reference
from engine.kernels.metadata import AttentionMetadata

PUBLIC_OPS = (
    "rms_norm",
    "add_rms_norm",
    "act_mul",
    "rope_write_kv",
    "paged_attention",
    "batch_invariant_linear",
)


def begin_step(metadata: AttentionMetadata) -> None:
    """Forget what earlier forwards derived from `metadata`; call at the start of every forward.

    Layers of one forward then share what depends on the batch alone (the CPU path's plan, the
    decode kernel's work list). Under CUDA graph capture the call belongs inside the capture. A
    forward that never calls it is correct, but derives everything once per layer.
    """
    metadata.step_cache = {}


rms_norm = reference.rms_norm
add_rms_norm = reference.add_rms_norm
act_mul = reference.act_mul
rope_write_kv = reference.rope_write_kv
paged_attention = reference.paged_attention
batch_invariant_linear = reference.batch_invariant_linear

__all__ = [*PUBLIC_OPS, "begin_step"]
