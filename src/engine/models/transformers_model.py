"""`TransformersModel`: any other causal language model of transformers, over our KV cache.

What the decoder does not describe runs in transformers' own code, layer by layer, with its
attention replaced by ours (`transformers_attention`), so continuous batching, paged KV and prefix
caching work as for every model. Products are torch's own: slower than the decoder, and on a CPU a
sequence's bits may depend on its neighbours.

A batch is one row of tokens with positions of their own. That is right for models in which tokens
meet in attention alone, and whose positions come from `position_ids`. Whether a model is one of
those is tried before it is used: two prompts and their next tokens, once in transformers' own way
and once in ours, must have the same logits.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from engine.errors import UnsupportedModelError
from engine.kernels import dispatch
from engine.kernels.kv_cache import KVCache
from engine.kernels.metadata import AttentionMetadata
from engine.models.transformers_attention import ATTENTION_NAME, LayerHeads, adopt
from engine.models.transformers_loading import fill_weights, skeleton

if TYPE_CHECKING:
    from engine.models.transformers_config import TransformersConfig
    from engine.models.weight_loading import WeightSource

_PROBE_LENS = (13, 11)
_PROBE_BLOCK = 16
_MOST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
"""Of the logits, root mean square, relative to their own: rounding stays far below, a token that
sees another sequence or a wrong position is far above."""


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """What an engine needs to know of a model; `DecoderConfig` has the same names."""

    architecture: str
    vocab_size: int
    max_position_embeddings: int
    num_layers: int
    num_kv_heads: int
    head_dim: int


class TransformersModel:
    """A model of transformers on one device; build, `load`, then `forward`, as a `Decoder`.

    Args:
        config: The model.
        device: Where weights, inputs and KV cache live.
        dtype: Of weights, activations, logits and KV cache.
        max_model_len: Longest sequence. Default: what the checkpoint was made for.

    Raises:
        UnsupportedModelError: The model does not take attention functions.
    """

    def __init__(
        self,
        config: TransformersConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        max_model_len: int | None = None,
    ) -> None:
        self._source = config
        self.device = device
        self.dtype = dtype
        self.max_model_len = max_model_len or config.max_position_embeddings
        if config.is_chunked:
            msg = (
                f"{config.architecture} attends within chunks, which do not reach its attention "
                "function in transformers' own code. Only a native Llama 4 may."
            )
            raise UnsupportedModelError(msg)
        self._model = skeleton(config)
        self._step = adopt(self._model, dtype)
        self._model.set_attn_implementation(ATTENTION_NAME)
        prefix = self._model.base_model_prefix
        if not isinstance(getattr(self._model, prefix, None), torch.nn.Module):
            msg = f"{config.architecture} has no base model {prefix!r} to take hidden states from."
            raise UnsupportedModelError(msg)
        self._decoder = getattr(self._model, prefix)
        # The same model with hidden states put in where its layers were: what stands between them
        # and the logits (bias, scale, bound) stays the model's own business.
        self._given = _GivenHidden()
        self._head = copy.copy(self._model)
        self._head._modules = {**self._model._modules, prefix: self._given}
        self.config = ModelSizes(
            architecture=config.architecture,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            num_layers=0,
            num_kv_heads=0,
            head_dim=0,
        )

    def kv_cache_shape(self, num_blocks: int, block_size: int) -> tuple[int, int, int, int]:
        """Shape of one layer's `k_cache`, and of its `v_cache`."""
        return (num_blocks, block_size, self.config.num_kv_heads, self.config.head_dim)

    @torch.inference_mode()
    def load(self, checkpoint: WeightSource) -> None:
        """Fill every weight, look at the layers, and try the model; call once.

        Raises:
            CheckpointError: Tensors are missing, unknown or of the wrong shape.
            UnsupportedModelError: The model does what our batches do not allow; says what.
        """
        fill_weights(self._model, checkpoint, self._source, self.device, self.dtype)
        # Tying and moving may have replaced modules.
        self._head._modules = {
            name: self._given if name == self._model.base_model_prefix else module
            for name, module in self._model._modules.items()
        }
        self._look_at_layers()
        self._try_out()

    @torch.inference_mode()
    def forward(
        self,
        input_ids: torch.Tensor,
        kv_caches: Sequence[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Hidden states after the final norm, new [T, H]; arguments as in `Decoder.forward`."""
        dispatch.begin_step(metadata)
        self._step.begin(kv_caches, metadata)
        return self._hidden(input_ids, metadata.positions)

    @torch.inference_mode()
    def compute_logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of R rows of `forward`'s result, [R, V]; as in `Decoder.compute_logits`."""
        self._given.hidden = hidden[None]
        # The ids say how many rows there are and nothing else: their model is not run.
        ids = torch.zeros((1, hidden.shape[0]), dtype=torch.int64, device=self.device)
        logits: torch.Tensor = self._head(input_ids=ids, use_cache=False).logits[0]
        self._given.hidden = None
        return logits if out is None else out.copy_(logits)

    def _hidden(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        result = self._decoder(
            input_ids=input_ids[None],
            position_ids=positions[None],
            use_cache=False,
            return_dict=True,
        )
        hidden: torch.Tensor = result.last_hidden_state[0]
        return hidden

    def _look_at_layers(self) -> None:
        """Learn how many layers call attention, and with which heads."""
        self._step.begin()
        ids = torch.zeros(2, dtype=torch.int64, device=self.device)
        try:
            self._hidden(ids, torch.arange(2, device=self.device))
        except UnsupportedModelError:
            raise
        except Exception as error:
            msg = (
                f"{self.config.architecture} could not be run with a row of tokens and their "
                f"positions: {type(error).__name__}: {error}"
            )
            raise UnsupportedModelError(msg) from error
        heads = self._step.heads
        self._refuse_layers(heads)
        self.config = dataclasses.replace(
            self.config,
            num_layers=len(heads),
            num_kv_heads=heads[0].num_kv_heads,
            head_dim=heads[0].head_dim,
        )

    def _refuse_layers(self, heads: list[LayerHeads]) -> None:
        name = self.config.architecture
        problem = ""
        if not heads:
            problem = "never calls the attention function (has it layers of another kind?)"
        elif len({(layer.num_kv_heads, layer.head_dim) for layer in heads}) > 1:
            problem = "has layers with different numbers or sizes of heads"
        else:
            num_windows = sum(layer.window is not None for layer in heads)
            wanted = self._source.num_sliding_layers(len(heads), self.max_model_len)
            if num_windows < wanted:
                problem = (
                    f"has a sliding window of {self._source.sliding_window} tokens that does not "
                    f"reach its attention function (max_model_len={self._source.sliding_window} "
                    "would do without)"
                )
        if problem:
            msg = f"{name} {problem}, so it cannot run over a paged KV cache."
            raise UnsupportedModelError(msg)

    def _try_out(self) -> None:
        """Compare our way of running the model with transformers' own."""
        generator = torch.Generator().manual_seed(0)
        texts = [
            torch.randint(self.config.vocab_size, (length + 1,), generator=generator)
            for length in _PROBE_LENS
        ]
        texts = [text.to(self.device) for text in texts]
        own = self._own_logits(texts)
        shape = self.kv_cache_shape(len(texts) + 1, _PROBE_BLOCK)
        caches = [
            (
                torch.zeros(shape, dtype=self.dtype, device=self.device),
                torch.zeros(shape, dtype=self.dtype, device=self.device),
            )
            for _ in range(self.config.num_layers)
        ]
        prefill = self._run_probe(texts, caches, [(0, length) for length in _PROBE_LENS])
        decode = self._run_probe(texts, caches, [(length, length + 1) for length in _PROBE_LENS])
        for text_own, *ours in zip(own, prefill, decode, strict=True):
            got, want = torch.cat(ours).float(), text_own.float()
            error = (got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt().clamp_min(1e-6)
            if not error < _MOST_ERROR[self.dtype]:
                msg = (
                    f"{self.config.architecture} gives other logits over a paged KV cache than in "
                    f"transformers (relative error {error:.2g}): its tokens meet outside of "
                    "attention, keep a state, or take positions from elsewhere. It cannot be run."
                )
                raise UnsupportedModelError(msg)

    def _own_logits(self, texts: list[torch.Tensor]) -> list[torch.Tensor]:
        """Logits of each text in transformers' own way."""
        # The one that honours everything: sdpa leaves out the bound on the scores in some versions.
        self._model.set_attn_implementation("eager")
        try:
            return [self._model(input_ids=text[None], use_cache=False).logits[0] for text in texts]
        finally:
            self._model.set_attn_implementation(ATTENTION_NAME)

    def _run_probe(
        self,
        texts: list[torch.Tensor],
        caches: Sequence[KVCache],
        spans: list[tuple[int, int]],
    ) -> tuple[torch.Tensor, ...]:
        """Logits of the spans of all texts in one step; text i has block i + 1."""
        counts = [end - start for start, end in spans]
        positions = torch.cat([torch.arange(*span) for span in spans])
        blocks = torch.arange(1, len(texts) + 1, dtype=torch.int32)
        owners = torch.repeat_interleave(blocks.long(), torch.tensor(counts))
        lens = torch.tensor([end for _, end in spans], dtype=torch.int32)
        starts = torch.zeros(len(texts) + 1, dtype=torch.int32)
        starts[1:] = torch.tensor(counts).cumsum(0)
        metadata = AttentionMetadata(
            positions=positions.to(self.device),
            slot_mapping=(owners * _PROBE_BLOCK + positions).to(self.device),
            block_table=blocks[:, None].to(self.device),
            seq_lens=lens.to(self.device),
            query_lens=torch.tensor(counts, dtype=torch.int32, device=self.device),
            query_start_loc=starts.to(self.device),
            num_decodes=len(texts) if max(counts) == 1 else 0,
            max_query_len=max(counts),
            max_seq_len=int(lens.max()),
            seq_lens_host=lens.tolist(),
            query_lens_host=counts,
            block_table_host=blocks[:, None].tolist(),
        )
        ids = torch.cat([text[slice(*span)] for text, span in zip(texts, spans, strict=True)])
        logits = self.compute_logits(self.forward(ids, caches, metadata))
        parts: tuple[torch.Tensor, ...] = logits.split(counts)
        return parts


class _GivenHidden(torch.nn.Module):
    """Stands where a model's layers were, and returns the hidden states it was given."""

    hidden: torch.Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=self.hidden)
