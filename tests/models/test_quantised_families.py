"""Every family with weights in codes, experts and merged projections too."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from loader_files import write_folder
from model_driver import PagedDriver
from model_zoo import FAMILIES, DictCheckpoint, config_dict, hf_model, stored_weights
from quantised_formats import FORMATS, mxfp4

from engine.errors import UnsupportedModelError
from engine.layers.cpu_quantised import has_quick_products
from engine.layers.linear import Linear
from engine.layers.moe import MixtureOfExperts
from engine.layers.quantised_linear import QuantisedLinear
from engine.loader.checkpoint import open_checkpoint
from engine.loader.resolve import resolve_model
from engine.models.decoder import Decoder
from engine.models.quantised_loading import make_factory
from engine.models.registry import decoder_config

CPU = torch.device("cpu")
# Not products, or left out by every recipe.
PLAIN = ("embed", "wte", "wpe", "lm_head", "norm", "router", "mlp.gate.", "_gate.", "moe.gate.")
TRANSPOSED = ("gpt2",)
STACKED = ("granitemoe", "granite-moe", "llama4")


def written(
    family: str, kind_name: str = "w8a8", **changes: Any
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Any]:
    """(tensors in codes, the numbers they stand for, config) of a family's model.

    W8A8 has a scale for each row and fits weights of any size; MXFP4 has blocks of 32.
    """
    kind = FORMATS[kind_name]
    config = dict(kind.config)
    if family.startswith("gpt-oss"):
        changes = {"intermediate_size": 160, **changes}
    model = hf_model(family, **changes)
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, torch.Tensor] = {}
    for name, weight in stored_weights(model).items():
        module = name.removesuffix(".weight")
        if family.startswith("gpt-oss") and "experts" in name and weight.dim() == 3:
            config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
            stored, numbers[name] = mxfp4(weight)
            tensors |= {f"{name}_{ending}": value for ending, value in stored.items()}
        elif (
            family.startswith("gpt-oss")
            or weight.dim() != 2
            or any(part in f"{name}" for part in PLAIN)
            or not name.endswith(".weight")
        ):
            tensors[name] = numbers[name] = weight
        else:
            stored, numbers[name] = kind.write(weight)
            tensors |= {module + ending: value for ending, value in stored.items()}
    return tensors, numbers, {**config_dict(model), "quantization_config": config}


def loaded(folder: Path, dtype: torch.dtype = torch.float32, *, codes: bool = True) -> Decoder:
    files = resolve_model(str(folder))
    decoder = Decoder(decoder_config(files.config), CPU, dtype)
    with open_checkpoint(files) as checkpoint:
        decoder.load(checkpoint, make_factory(CPU, dtype, decoder.step_rows) if codes else None)
    return decoder


def plain(numbers: dict[str, torch.Tensor], config: dict[str, Any]) -> Decoder:
    decoder = Decoder(decoder_config(config), CPU, torch.float32)
    decoder.load(DictCheckpoint(numbers))
    return decoder


def logits_of(decoder: Decoder) -> torch.Tensor:
    token_ids = torch.randint(3, 200, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    driver = PagedDriver(decoder, num_blocks=8, block_size=16, num_layers=decoder.config.num_layers)
    seq = driver.add(token_ids)
    rows = [driver.step([(seq, 37)])[0]]
    rows += [driver.step([(seq, 1)])[0] for _ in range(3)]
    return torch.cat(rows).float()


def plain_linears(decoder: Decoder) -> list[str]:
    """Layers of products that are not quantised, but for routers."""
    found = []
    for layer in decoder.layers:
        for owner in (layer.attention, layer.mlp, getattr(layer.mlp, "shared", None)):
            for name, linear in vars(owner).items() if owner is not None else ():
                if isinstance(linear, Linear) and not isinstance(linear, QuantisedLinear):
                    found.append(name)
    return [name for name in found if name not in ("router", "shared_gate")]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in TRANSPOSED])
def test_a_family_in_codes_is_the_family(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, numbers, config = written(family)
    with caplog.at_level(logging.WARNING, logger="engine"):
        decoder = loaded(write_folder(tmp_path / "m", tensors, config))
    assert not [record for record in caplog.records if record.name.startswith("engine")]
    if not family.startswith("gpt-oss"):
        assert not plain_linears(decoder)
    if not family.startswith(STACKED):
        for layer in decoder.layers:
            if isinstance(layer.mlp, MixtureOfExperts):
                assert layer.mlp.has_products
    expected = logits_of(plain(numbers, config))
    assert (logits_of(decoder) - expected).abs().max() < 2e-4 * max(1.0, float(expected.std()))


def test_transposed_weights_in_codes_are_refused(tmp_path: Path) -> None:
    tensors, _, config = written("gpt2")
    folder = write_folder(tmp_path / "m", tensors, config)
    with pytest.raises(UnsupportedModelError, match=r"c_attn.*rows and columns exchanged"):
        loaded(folder)


@pytest.mark.skipif(
    not has_quick_products(torch.bfloat16), reason="no quick products for quantised weights here"
)
def test_experts_in_four_bits_do_not_notice_other_sequences(tmp_path: Path) -> None:
    """A token's rows are among those of others in each expert, decoding ones before prompts."""
    tensors, _, config = written("mixtral", "w4a16", intermediate_size=64)
    decoder = loaded(write_folder(tmp_path / "m", tensors, config), torch.bfloat16)
    mlp = decoder.layers[0].mlp
    assert isinstance(mlp, MixtureOfExperts)
    assert mlp.has_products
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 200, (size,), generator=generator).tolist() for size in (9, 30, 17)]

    def run(groups: list[list[int]]) -> dict[int, list[torch.Tensor]]:
        found: dict[int, list[torch.Tensor]] = {}
        for group in groups:
            driver = PagedDriver(
                decoder, num_blocks=16, block_size=16, num_layers=decoder.config.num_layers
            )
            sequences = {index: driver.add(prompts[index]) for index in group}
            # The first is a step ahead, so that one step has decoding rows and prompts.
            found[group[0]] = [driver.step([(sequences[group[0]], None)])[0][-1]]
            for _ in range(3):
                for index in group:
                    if index in found:
                        sequences[index].token_ids.append(int(found[index][-1].argmax()))
                rows = driver.step([(sequences[index], None) for index in group])
                for index, logits in zip(group, rows, strict=True):
                    found.setdefault(index, []).append(logits[-1])
        return found

    alone, together = run([[0], [1], [2]]), run([[1, 0, 2]])
    for index in range(3):
        pairs = list(zip(alone[index], together[index], strict=False))
        assert len(pairs) >= 3
        assert all(torch.equal(one, other) for one, other in pairs), index
