"""`DecoderConfig`: a model family as data. The one decoder reads nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from engine.layers.latent_attention import LatentConfig
from engine.layers.moe import ExpertsConfig
from engine.layers.query_scale import QueryScale
from engine.layers.rope import RopeConfig

NORM_PLACES = ("before", "around", "after", "parallel", "parallel_shared")


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
        norm_kind: "rms" or "layer".
        norm_bias: Whether layer norms have a bias.
        norm_offset: 1.0 where RMS norms multiply by `1 + weight` (Gemma).
        norm_places: Where norms stand around the two halves of a layer, attention and feed-forward:

            - "before": `x += half(norm(x))` (Llama).
            - "around": `x += norm(half(norm(x)))` (Gemma 2 and later).
            - "after": `x += norm(half(x))` (OLMo 2 and later).
            - "parallel": `x += attention(norm_1(x)) + feed_forward(norm_2(x))` (GPT-NeoX).
            - "parallel_shared": the same with one norm for both (Phi 1 and 2, GPT-J, Cohere).
        qk_norms: RMS norm of each layer's queries and keys before rotation: "" for none, "head"
            for each head by itself (Qwen 3), "projection" over all heads together (OLMo 2),
            "unweighted" for each head and without a weight (Llama 4).
        qkv_bias: Biases of the q, k and v projections.
        output_bias: Bias of the attention's output projection.
        mlp_bias: Biases of the feed-forward projections.
        mlp_kind: "gated", or "plain" without a gate.
        activation: "silu", "gelu" or "gelu_tanh"; of a plain feed-forward also "relu" or "relu2".
        experts: The mixture of experts of each layer; None for a layer with one feed-forward.
        ropes: Rotation of each layer; None for a layer without positions.
        rotates_neighbours: Whether the checkpoint pairs entries 2i and 2i + 1 of a head instead of
            i and i + rot_dim / 2. Loading reorders the rows of q and k, so nothing else knows.
        num_learned_positions: Rows of a learned position embedding; 0 for none.
        sliding_windows: Tokens that a position of each layer sees, itself included; None for all.
        chunk_sizes: A position of each layer sees the chunk of so many tokens it is in, up to
            itself; None for all.
        query_scales: Factor on the queries of each layer by position; None for none.
        has_sinks: Whether every head has a score that no value belongs to (gpt-oss).
        latent: Sizes of latent attention; None for heads of keys and values of their own.
        softmax_scale: Factor on the attention scores.
        attention_softcap: Bound on the attention scores; 0 for none.
        final_softcap: Bound on the logits; 0 for none.
        embedding_scale: Factor on the embeddings.
        residual_scale: Factor on the output of each half of a layer.
        logits_scale: Factor on the logits.
        tie_word_embeddings: Whether the output projection is the embedding.
        lm_head_bias: Whether the output projection has a bias.
        is_text_part: Whether checkpoints hold other parts, too, which stay unread.
        weight_names: How checkpoints spell the weights, a key of `weight_names.WEIGHT_NAMES`.
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
    norm_kind: str = "rms"
    norm_bias: bool = False
    norm_offset: float = 0.0
    norm_places: str = "before"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    mlp_kind: str = "gated"
    activation: str = "silu"
    experts: tuple[ExpertsConfig | None, ...]
    qk_norms: tuple[str, ...]
    ropes: tuple[RopeConfig | None, ...]
    rotates_neighbours: bool = False
    num_learned_positions: int = 0
    sliding_windows: tuple[int | None, ...]
    chunk_sizes: tuple[int | None, ...]
    query_scales: tuple[QueryScale | None, ...]
    has_sinks: bool = False
    latent: LatentConfig | None = None
    softmax_scale: float
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    tie_word_embeddings: bool = False
    lm_head_bias: bool = False
    is_text_part: bool = False
    weight_names: str = "llama"

    @property
    def is_parallel(self) -> bool:
        """Whether both halves of a layer read the same residual stream."""
        return self.norm_places in ("parallel", "parallel_shared")

    @property
    def distinct_layers(self) -> list[int]:
        """One layer of each kind, in order, and the last."""
        kinds = list(
            zip(
                self.experts,
                self.qk_norms,
                self.ropes,
                self.sliding_windows,
                self.chunk_sizes,
                self.query_scales,
                strict=True,
            )
        )
        return sorted({*map(kinds.index, kinds), self.num_layers - 1})

    def chunk_size_within(self, index: int, max_model_len: int) -> int | None:
        """Chunk size of a layer; None where one chunk holds every sequence."""
        size = self.chunk_sizes[index]
        return None if size is None or size >= max_model_len else size
