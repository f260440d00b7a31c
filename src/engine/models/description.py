"""`DecoderConfig`: a model family as data. The one decoder reads nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from engine.layers.rope import RopeConfig


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and switches of a Llama-like decoder.

    The defaults are Llama's. `models.registry` fills it from a checkpoint's `config.json`.

    Attributes:
        architecture: The checkpoint's own name for it, for messages.
        vocab_size: V.
        hidden_size: H.
        intermediate_size: I, width of the feed-forward half.
        num_layers: Decoder layers.
        num_q_heads: Hq.
        num_kv_heads: Hkv, a divisor of Hq.
        head_dim: D; Hq * D need not equal H.
        max_position_embeddings: Positions the checkpoint was made for.
        norm_eps: Epsilon of every norm.
        norm_offset: 1.0 where norms multiply by `1 + weight` (Gemma).
        has_post_norms: Whether the output of each half of a layer is normalised, too, before it
            joins the residual stream (Gemma 2 and later).
        has_qk_norm: Whether q and k heads are normalised before rotation.
        qkv_bias: Biases of the q, k and v projections.
        output_bias: Bias of the attention's output projection.
        mlp_bias: Biases of the feed-forward projections.
        activation: "silu", "gelu" or "gelu_tanh".
        ropes: Rotation of each layer; None for a layer without positions.
        sliding_windows: Tokens that a position of each layer sees, itself included; None for all.
        softmax_scale: Factor on the attention scores.
        attention_softcap: Bound on the attention scores; 0 for none.
        final_softcap: Bound on the logits; 0 for none.
        embedding_scale: Factor on the embeddings.
        residual_scale: Factor on the output of each half of a layer.
        logits_scale: Factor on the logits.
        tie_word_embeddings: Whether the output projection is the embedding.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    norm_offset: float = 0.0
    has_post_norms: bool = False
    has_qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    ropes: tuple[RopeConfig | None, ...]
    sliding_windows: tuple[int | None, ...]
    softmax_scale: float
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    tie_word_embeddings: bool = False

    @property
    def num_parameters(self) -> int:
        """Numbers in the checkpoint, tied ones once."""
        hidden, q_size = self.hidden_size, self.num_q_heads * self.head_dim
        kv_size, width = self.num_kv_heads * self.head_dim, self.intermediate_size
        qkv_size = q_size + 2 * kv_size
        layer = hidden * (qkv_size + q_size) + 3 * hidden * width
        layer += qkv_size * self.qkv_bias + hidden * self.output_bias
        layer += (2 * width + hidden) * self.mlp_bias
        layer += hidden * (4 if self.has_post_norms else 2) + 2 * self.head_dim * self.has_qk_norm
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_layers * layer + hidden
