"""A rehearsed forward launches whatever a whole one does, with fewer layers."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from model_driver import PagedDriver
from model_zoo import FAMILIES, described
from torch.utils._python_dispatch import TorchDispatchMode

from engine.kernels import dispatch
from engine.models.decoder import Decoder

PER_LAYER = (
    "experts",
    "qk_norms",
    "ropes",
    "sliding_windows",
    "chunk_sizes",
    "query_scales",
)


def kind_of(value: Any) -> Any:
    """What a kernel is compiled or a library call is chosen for."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.stride()
    if isinstance(value, list | tuple):
        return tuple(map(kind_of, value))
    return value if isinstance(value, int | float | str | bool | None) else type(value).__name__


class Operations(TorchDispatchMode):
    """Every operation of torch with the kinds of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen.add((str(function), kind_of(args), kind_of(list((kwargs or {}).items()))))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """What the layers ask `dispatch` for."""
    seen: set[Any] = set()

    def spied(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.add((name, kind_of(args), kind_of(sorted(kwargs.items()))))
            return function(*args, **kwargs)

        return call

    for name, function in inspect.getmembers(dispatch, inspect.isfunction):
        if function.__module__ == dispatch.__name__ and name != "begin_step":
            monkeypatch.setattr(dispatch, name, spied(name, function))
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer_of_each_kind_does_what_all_do(family: str, calls: set[Any]) -> None:
    torch.manual_seed(0)
    decoder = Decoder(described(family), torch.device("cpu"), torch.float32)
    for name, weight in decoder.named_weights():
        weight.normal_(1.0 if "norm" in name else 0.0, 0.02)
    num_layers = decoder.config.num_layers
    driver = PagedDriver(decoder, num_blocks=16, block_size=16, num_layers=num_layers)

    def run() -> tuple[set[Any], set[Any]]:
        calls.clear()
        prompt, decode = driver.add(range(3, 40)), driver.add([5, 6])
        driver.step([(decode, 1)])
        with Operations() as operations:
            driver.step([(decode, 1), (prompt, None)])
        return operations.seen, set(calls)

    whole = run()
    caches = driver.kv_caches
    with decoder.rehearsal() as layers:
        driver.kv_caches = [caches[index] for index in layers]
        rehearsed = run()
    assert layers == sorted(set(layers))
    if not any(decoder.config.experts):  # on a CPU each expert's rows depend on numbers
        assert rehearsed[0] == whole[0]
    assert rehearsed[1] == whole[1]
    driver.kv_caches = caches
    assert len(run()[1]) == len(whole[1])


def test_thirty_equal_layers_are_two() -> None:
    config = described("llama")
    kinds = {name: getattr(config, name)[:1] * 30 for name in PER_LAYER}
    assert type(config)(
        **{**{name: getattr(config, name) for name in config.__dataclass_fields__}, **kinds}
        | {"num_layers": 30}
    ).distinct_layers == [0, 29]
