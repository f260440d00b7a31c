"""`EncoderConfig`: an encoder family as data. The one encoder reads nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from engine.layers.rope import RopeConfig


@dataclass(frozen=True, kw_only=True)
class EncoderNames:
    """What a family calls its weights, after the prefix that a checkpoint may put before them.

    Entries are module names; ".weight" and ".bias" are added. `{}` is the layer's number.
    """

    words: str = "embeddings.word_embeddings"
    positions: str = "embeddings.position_embeddings"
    token_types: str = "embeddings.token_type_embeddings"
    embedding_norm: str = "embeddings.LayerNorm"
    qkv: tuple[str, ...] = (
        "encoder.layer.{}.attention.self.query",
        "encoder.layer.{}.attention.self.key",
        "encoder.layer.{}.attention.self.value",
    )
    output: str = "encoder.layer.{}.attention.output.dense"
    attention_norm: str = "encoder.layer.{}.attention.output.LayerNorm"
    up: str = "encoder.layer.{}.intermediate.dense"
    down: str = "encoder.layer.{}.output.dense"
    mlp_norm: str = "encoder.layer.{}.output.LayerNorm"
    final_norm: str = ""
    position_bias: str = ""


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What turns a pooled hidden state into a score: `out(norm(activation(dense(x))))`.

    Attributes:
        pooling: "cls", "mean" or "last": which hidden state is scored.
        out: Name of the last product, H -> 1.
        out_bias: Whether that has a bias.
        dense: Name of the product H -> H before it; "" for none.
        dense_bias: Whether that has a bias.
        activation: After `dense`: "tanh", "relu" or a name of `EncoderConfig.activation`.
        norm: Name of the norm after that; "" for none.
        norm_bias: Whether the norm has a bias.
        norm_eps: Its epsilon.
    """

    pooling: str
    out: str
    out_bias: bool = True
    dense: str = ""
    dense_bias: bool = True
    activation: str = "tanh"
    norm: str = ""
    norm_bias: bool = False
    norm_eps: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes and switches of an encoder whose attention looks both ways.

    The defaults are BERT's. `models.encoder_families` fills it from a checkpoint's `config.json`.

    Attributes:
        architecture: The checkpoint's own name for it, for messages.
        names: What the family calls its weights.
        prefixes: What may stand before all of these names; the first one that fits is taken.
        vocab_size: V.
        hidden_size: H.
        intermediate_size: I, width of the feed-forward half.
        num_layers: Layers.
        num_heads: Attention heads.
        max_positions: Tokens a text may have at most.
        num_position_rows: Rows of the table of learned positions; 0 without one.
        position_offset: Row of the first token's position.
        num_token_types: Rows of the table of token types; 0 without one.
        norm_eps: Epsilon of every norm.
        norm_bias: Whether norms have biases.
        is_pre_norm: Norms come before each half of a layer instead of after its residual sum. The
            first layer's attention then has none: the embeddings are normalised already.
        has_final_norm: Whether a norm follows the last layer.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        is_gated: The feed-forward half is `down(activation(a) * b)`, a and b merged in `up`.
        attention_bias: Whether qkv and output products have biases.
        mlp_bias: Whether the feed-forward products have.
        ropes: Rotation of each layer; empty for learned positions.
        windows: Tokens that a position sees to either side, by layer; None for all.
        num_position_buckets: Of the bias on the scores that depends on the distance (MPNet); 0
            without one.
        head: Of a model that scores; None for one that embeds.
    """

    architecture: str
    names: EncoderNames = EncoderNames()
    prefixes: tuple[str, ...] = ("",)
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    num_position_rows: int = 0
    position_offset: int = 0
    num_token_types: int = 0
    norm_eps: float = 1e-12
    norm_bias: bool = True
    is_pre_norm: bool = False
    has_final_norm: bool = False
    activation: str = "gelu"
    is_gated: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    ropes: tuple[RopeConfig, ...] = ()
    windows: tuple[int | None, ...] = ()
    num_position_buckets: int = 0
    head: HeadConfig | None = None

    @property
    def head_dim(self) -> int:
        """D."""
        return self.hidden_size // self.num_heads

    @property
    def num_parameters(self) -> int:
        """Numbers in the checkpoint, but for biases, norms and the head."""
        up = self.intermediate_size * (2 if self.is_gated else 1)
        layer = self.hidden_size * (4 * self.hidden_size + up + self.intermediate_size)
        tables = self.vocab_size + self.num_position_rows + self.num_token_types
        return self.num_layers * layer + tables * self.hidden_size
