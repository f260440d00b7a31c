"""Checkpoints into the decoder: names, merged places, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from model_zoo import FAMILIES, DictCheckpoint, config_dict, hf_model, stored_weights
from safetensors.torch import save_file

from engine.errors import CheckpointError
from engine.loader.checkpoint import DummyCheckpoint, SafetensorsCheckpoint
from engine.models.decoder import Decoder, num_parameters, weight_bytes
from engine.models.description import DecoderConfig
from engine.models.registry import decoder_config

CPU = torch.device("cpu")


def describe(family: str) -> DecoderConfig:
    return decoder_config(config_dict(hf_model(family)))


def empty_decoder(family: str = "llama") -> Decoder:
    return Decoder(describe(family), CPU, torch.float32)


def state_of(family: str = "llama") -> dict[str, torch.Tensor]:
    return dict(hf_model(family).state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_that_transformers_writes_is_read_and_no_other(family: str) -> None:
    checkpoint = DictCheckpoint(stored_weights(hf_model(family)))
    empty_decoder(family).load(checkpoint)
    assert set(checkpoint.read_names) == set(checkpoint.tensors)
    numbers = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    if family == "opt":
        numbers -= 2 * 64  # the first two positions are for padding
    assert num_parameters(describe(family)) == numbers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tensor_of_another_shape_is_named(family: str) -> None:
    """Every tensor in turn, one row longer."""
    checkpoint = DictCheckpoint(stored_weights(hf_model(family)))
    decoder = empty_decoder(family)
    for name, tensor in list(checkpoint.tensors.items()):
        checkpoint.tensors[name] = torch.cat((tensor, tensor[:1]))
        with pytest.raises(CheckpointError, match=re.escape(repr(name))):
            decoder.load(checkpoint)
        checkpoint.tensors[name] = tensor
    assert checkpoint.read_names == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_tensor_is_named(family: str) -> None:
    checkpoint = DictCheckpoint(stored_weights(hf_model(family)))
    decoder = empty_decoder(family)
    for name, tensor in list(checkpoint.tensors.items()):
        del checkpoint.tensors[name]
        with pytest.raises(CheckpointError, match=re.escape(repr(name))):
            decoder.load(checkpoint)
        checkpoint.tensors[name] = tensor
    assert checkpoint.read_names == []


def test_every_tensor_is_read_once_and_straight_into_its_place() -> None:
    decoder = empty_decoder("qwen2")
    views = dict(decoder.named_weights())
    merged = decoder.layers[1].attention.qkv_proj
    storage = merged.weight.untyped_storage().data_ptr()
    for part in ("q_proj", "k_proj", "v_proj"):
        view = views[f"model.layers.1.self_attn.{part}.weight"]
        assert view.untyped_storage().data_ptr() == storage
        assert view.is_contiguous()
    checkpoint = DictCheckpoint(state_of("qwen2"))
    del checkpoint.tensors["lm_head.weight"]  # tied
    decoder.load(checkpoint)
    assert sorted(checkpoint.read_names) == sorted(checkpoint.tensors)


def test_merged_weights_lie_in_the_order_of_their_parts() -> None:
    decoder = empty_decoder("llama-biases")
    state = state_of("llama-biases")
    for name, view in decoder.named_weights():
        view.copy_(state[name])
    prefix = "model.layers.2."
    for merged, parts in (
        (decoder.layers[2].attention.qkv_proj, ["self_attn.q_proj", "self_attn.k_proj"]),
        (decoder.layers[2].mlp.gate_up_proj, ["mlp.gate_proj", "mlp.up_proj"]),
    ):
        weights = torch.cat([state[f"{prefix}{part}.weight"] for part in parts])
        biases = torch.cat([state[f"{prefix}{part}.bias"] for part in parts])
        assert merged.bias is not None
        assert torch.equal(merged.weight[: len(weights)], weights)
        assert torch.equal(merged.bias[: len(biases)], biases)


def test_missing_tensor_is_named() -> None:
    state = state_of()
    del state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"lacks 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        empty_decoder().load(DictCheckpoint(state))


def test_missing_output_projection_is_an_error_unless_tied() -> None:
    state = state_of()
    del state["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        empty_decoder().load(DictCheckpoint(state))


def test_unknown_tensors_are_named_and_counted() -> None:
    state = state_of()
    for index in range(7):
        state[f"model.layers.{index}.self_attn.q_proj.lora_A"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.lora_A.* and 3 more"):
        empty_decoder().load(DictCheckpoint(state))


def test_misshapen_tensor_is_named_with_both_shapes() -> None:
    state = state_of()
    state["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(48, 64)
    with pytest.raises(CheckpointError, match=r"k_proj.*\(48, 64\).*\(32, 64\)"):
        empty_decoder().load(DictCheckpoint(state))


def test_nothing_is_read_from_a_bad_checkpoint() -> None:
    state = state_of()
    del state["model.norm.weight"]
    checkpoint = DictCheckpoint(state)
    with pytest.raises(CheckpointError):
        empty_decoder().load(checkpoint)
    assert checkpoint.read_names == []


def test_rotary_buffers_and_a_tied_copy_are_left_unread() -> None:
    state = state_of("llama-tied-mha")
    state["model.rotary_emb.inv_freq"] = torch.zeros(8)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    assert "lm_head.weight" in state
    checkpoint = DictCheckpoint(state)
    empty_decoder("llama-tied-mha").load(checkpoint)
    assert not {name for name in checkpoint.read_names if "inv_freq" in name or "lm_head" in name}


def test_bare_model_without_prefix_is_accepted() -> None:
    state = {
        name.removeprefix("model."): tensor for name, tensor in state_of("llama-tied-mha").items()
    }
    del state["lm_head.weight"]
    checkpoint = DictCheckpoint(state)
    empty_decoder("llama-tied-mha").load(checkpoint)
    assert sorted(checkpoint.read_names) == sorted(state)


def test_safetensors_and_memory_give_the_same_model(tmp_path) -> None:
    state = {name: tensor.clone() for name, tensor in state_of("qwen3").items()}
    save_file(state, tmp_path / "model.safetensors")
    from_file, from_memory = empty_decoder("qwen3"), empty_decoder("qwen3")
    with SafetensorsCheckpoint([tmp_path / "model.safetensors"]) as checkpoint:
        from_file.load(checkpoint)
    from_memory.load(DictCheckpoint(state))
    hidden = torch.randn(5, 64)
    assert torch.equal(from_file.compute_logits(hidden), from_memory.compute_logits(hidden))
    x = from_memory.layers[0].mlp(hidden)
    assert torch.equal(from_file.layers[0].mlp(hidden), x)


def test_dummy_weights_need_no_names() -> None:
    decoder = empty_decoder()
    decoder.load(DummyCheckpoint(seed=1))
    assert decoder.compute_logits(torch.randn(2, 64)).isfinite().all()


@pytest.mark.parametrize("family", ["llama", "llama-tied-mha", "llama-biases", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_bytes_is_what_the_weights_take(family: str, dtype: torch.dtype) -> None:
    config = describe(family)
    decoder = Decoder(config, CPU, dtype)
    allocated = sum(view.numel() * view.element_size() for _, view in decoder.named_weights())
    decoder.load(DummyCheckpoint())
    packed = decoder.lm_head.packed
    if config.tie_word_embeddings and packed is not None:
        allocated += config.vocab_size * config.hidden_size * dtype.itemsize
    assert weight_bytes(config, dtype, CPU) == allocated
    assert weight_bytes(config, dtype, torch.device("meta")) == num_parameters(config) * (
        dtype.itemsize
    )


def test_plain_weights_are_given_back_once_packed() -> None:
    decoder = empty_decoder()
    linear = decoder.layers[0].mlp.down_proj
    decoder.load(DummyCheckpoint())
    if linear.packed is None:
        pytest.skip("this CPU has no blocked layout")
    assert linear.weight.numel() == 0
