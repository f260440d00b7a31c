"""The GPU's layers over weights in codes, on the CPU through the kernels' plain twins.

That the kernels are their twins' equals is `tests/kernels/test_triton_quantised.py`'s to show;
here are the layers: what is merged, shared and left plain, and that tokens are those of
transformers with the dequantised weights.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from loader_files import llama_config, random_model, write_gguf
from model_driver import PagedDriver

from engine.layers.cpu_quantised import CPUFactory
from engine.layers.gpu_quantised import CodedEmbedding, CodedLinear, GPUFactory, as_integers
from engine.layers.linear import Linear
from engine.layers.quantised_codes import QuantisedCodes
from engine.layers.quantised_eight import QuantisedEight
from engine.layers.quantised_linear import QuantisedLinear
from engine.layers.rounding import round_weight
from engine.loader.checkpoint import open_checkpoint
from engine.loader.resolve import resolve_model
from engine.models.decoder import Decoder, shapes_of
from engine.models.decoder_layer import DecoderLayer
from engine.models.quantised_loading import joins_codes
from engine.models.quantiser import Quantiser
from engine.models.registry import decoder_config

CPU = torch.device("cpu")
SIZES = {"hidden_size": 64, "intermediate_size": 96}


def load(path: Path, name: str | None = None, layers: str = "gpu") -> Decoder:
    """A float32 decoder with the layers of a GPU or a CPU; `name` rounds plain weights."""
    files = resolve_model(str(path))
    decoder = Decoder(decoder_config(files.config), CPU, torch.float32)
    quantiser = None
    if name is not None:
        shapes = {key: tuple(view.shape) for key, view in shapes_of(decoder.config).named_weights()}
        is_tied = decoder.config.tie_word_embeddings
        quantiser = Quantiser(name, torch.float32, shapes, is_tied=is_tied)
    with open_checkpoint(files) as checkpoint:
        factory = (
            GPUFactory(CPU, torch.float32, batch_invariant=False)
            if layers == "gpu"
            else CPUFactory(torch.float32, decoder.step_rows)
        )
        decoder.load(checkpoint, factory, quantiser)
    return decoder


def greedy(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    driver = PagedDriver(
        decoder, num_blocks=16, block_size=16, num_layers=decoder.config.num_layers
    )
    sequence = driver.add(prompt)
    for _ in range(count):
        sequence.token_ids.append(int(driver.step([(sequence, None)])[0][-1].argmax()))
    return sequence.token_ids[len(prompt) :]


def transformers_greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    return ids[0, len(prompt) :].tolist()


def saved(tmp_path: Path, **changes: object) -> tuple[Path, transformers.LlamaForCausalLM]:
    model = random_model(llama_config(**SIZES, **changes)).float()
    model.save_pretrained(tmp_path)
    return tmp_path, model


@pytest.mark.parametrize(("kind", "tied"), [("int4", False), ("int8", True)])
def test_steps_of_one_row_join_norms_and_residual_sums_to_their_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tied: bool
) -> None:
    path, _ = saved(tmp_path, tie_word_embeddings=tied)
    decoder = load(path, kind)
    assert joins_codes(decoder)
    apart = greedy(decoder, list(range(5, 25)), 8)
    decoder._max_fused_tokens = 1  # as on a GPU in 16 bits
    seen = []
    fused = DecoderLayer.fused

    def counted(layer: DecoderLayer, hidden: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(hidden.shape[0])
        return fused(layer, hidden, *rest)

    monkeypatch.setattr(DecoderLayer, "fused", counted)
    assert greedy(decoder, list(range(5, 25)), 8) == apart
    assert seen == [1] * 7 * decoder.config.num_layers


def test_layers_without_codes_are_not_fused_with_those_that_have_some(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    decoder = load(path, "int4")
    decoder.layers[1].mlp.down_proj = Linear(96, {"down_proj": 64}, device=CPU, dtype=torch.float32)
    assert not joins_codes(decoder)


@pytest.mark.parametrize("name", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", ["gpu", "cpu"])
def test_tokens_are_transformers_with_the_rounded_weights(
    tmp_path: Path, layers: str, name: str, tied: bool
) -> None:
    path, model = saved(tmp_path, tie_word_embeddings=tied)
    decoder = load(path, name, layers)
    layer = decoder.layers[1]
    kind = CodedLinear if layers == "gpu" else QuantisedLinear
    linears = [
        layer.attention.qkv_proj,
        layer.attention.o_proj,
        layer.mlp.gate_up_proj,
        layer.mlp.down_proj,
        decoder.lm_head,
    ]
    assert all(isinstance(linear, kind) for linear in linears)
    if layers == "gpu":
        assert all(len(linear.weights) == 1 for linear in linears)
        assert isinstance(decoder.embedding, CodedEmbedding) == tied
        if tied:  # one weight for both
            assert decoder.embedding._planes is decoder.lm_head.weights[0]
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim == 2 and ("embed" not in key or tied):
                is_output = "lm_head" in key or "embed" in key
                kind = "int8" if name == "int4" and is_output else name
                weight.copy_(round_weight(weight, kind).expand())
    prompt = torch.randint(0, 64, (21,), generator=torch.Generator().manual_seed(1)).tolist()
    assert greedy(decoder, prompt, 12) == transformers_greedy(model, prompt, 12)


@pytest.mark.parametrize("name", ["int4", "int8", "fp8"])
def test_experts_are_one_weight(tmp_path: Path, name: str) -> None:
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    model = random_model(config).float()
    model.save_pretrained(tmp_path)
    decoder = load(tmp_path, name)
    planes = decoder.layers[0].mlp._planes
    assert [weight.shape for weight in planes] == [(3 * 2 * 96, 64), (3 * 64, 96)]
    with torch.no_grad():
        for key, weight in model.named_parameters():
            kind = "int8" if name == "int4" and "lm_head" in key else name
            if weight.ndim == 3:
                rounded = round_weight(weight.flatten(0, 1), kind).expand()
                weight.copy_(rounded.view(weight.shape))
            elif weight.ndim == 2 and "embed" not in key and "gate.weight" not in key:
                weight.copy_(round_weight(weight, kind).expand())
    prompt = torch.randint(0, 64, (21,), generator=torch.Generator().manual_seed(3)).tolist()
    assert greedy(decoder, prompt, 12) == transformers_greedy(model, prompt, 12)


@pytest.mark.parametrize("ggml_type", ["Q4_0", "Q4_1", "Q8_0", "Q5_1"])
def test_tokens_of_a_gguf_file_are_those_of_its_expanded_weights(
    tmp_path: Path, ggml_type: str
) -> None:
    model = random_model(llama_config(**SIZES, tie_word_embeddings=False))
    path = write_gguf(tmp_path / "m.gguf", model, ggml_type=GGMLQuantizationType[ggml_type])
    decoder = load(path)
    assert isinstance(decoder.lm_head, CodedLinear)
    files = resolve_model(str(path))
    plain = Decoder(decoder_config(files.config), CPU, torch.float32)
    with open_checkpoint(files) as checkpoint:
        plain.load(checkpoint)
    prompt = torch.randint(0, 64, (21,), generator=torch.Generator().manual_seed(2)).tolist()
    assert greedy(decoder, prompt, 12) == greedy(plain, prompt, 12)


def test_int4_is_ggufs_q4_0() -> None:
    weight = torch.randn(6, 128)
    rounded = round_weight(weight, "int4")
    assert isinstance(rounded, QuantisedCodes)
    blocks = torch.from_numpy(quantize(weight.numpy(), GGMLQuantizationType.Q4_0)).view(6, 4, 18)
    halves = torch.cat((blocks[:, :, 2:] & 15, blocks[:, :, 2:] >> 4), -1)
    assert torch.equal(
        blocks[:, :, :2].contiguous().view(torch.float16)[:, :, 0].float(), rounded.scales
    )
    # A tie goes up there and to the even level here.
    assert (halves.flatten(1).int() - rounded.codes.int()).abs().max() <= 1
    assert (halves.flatten(1) != rounded.codes).float().mean() < 0.01


@pytest.mark.parametrize("name", ["int4", "int8", "fp8"])
def test_rounding_is_to_the_nearest_level(name: str) -> None:
    weight = torch.randn(5, 96)
    weight[2] = 0
    rounded = round_weight(weight, name)
    error = (rounded.expand() - weight).abs()
    largest = weight.abs().amax(1, keepdim=True)
    bound = {
        "int4": largest / 8,  # the other end of the range has one level less
        "int8": largest / 254,
        "fp8": torch.maximum(weight.abs() / 16, largest / 448 / 2**10),
    }[name]
    assert (error <= bound * 1.001).all()
    assert not rounded.expand()[2].any()


@pytest.mark.parametrize(
    ("dtype", "tile"),
    [(torch.int8, (1, 80)), (torch.int8, (24, 80)), (torch.float8_e4m3fn, (16, 32))],
)
def test_eight_bit_numbers_become_codes(dtype: torch.dtype, tile: tuple[int, int]) -> None:
    values = (torch.randn(24, 80) * 40).clamp(-127, 127).to(dtype)
    scales = torch.rand(-(-24 // tile[0]), -(-80 // tile[1]))
    eight = QuantisedEight(values, tile, scales)
    codes = as_integers(eight)
    assert codes.bits == 8
    if 80 % tile[1] == 0:
        assert torch.allclose(codes.expand(), eight.expand(), rtol=1e-5, atol=1e-5)
    assert codes.scales.shape == (24, scales.shape[1])
