"""Build a model of transformers without its weights, and fill them from our checkpoints.

`from_pretrained` changes the process while it runs: torch's default dtype, functions of torch and
methods of its own classes, all of which other threads see. Here nothing outside the new model
changes: its class is called as it is, under a mode of the calling thread that makes large tensors
without memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from engine.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from engine.models.transformers_config import TransformersConfig
    from engine.models.weight_loading import WeightSource

_TABLE_MAKERS = frozenset(
    {
        torch.arange,
        torch.eye,
        torch.full,
        torch.linspace,
        torch.logspace,
        torch.ones,
        torch.rand,
        torch.randn,
        torch.tensor,
        torch.tril_indices,
        torch.zeros,
    }
)
_MOST_REAL_NUMBERS = 1 << 20


class _TablesWithMemory(TorchFunctionMode):
    """Within `torch.device("meta")`: small tensors are real after all.

    Weights are made by `torch.empty`, which nothing computes with, or are large. Small tensors of
    other makers are, or become, tables that no checkpoint has: rotary frequencies, masks. Both
    modes are the calling thread's own.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func in _TABLE_MAKERS and options.get("device") is None and _is_table(func, args):
            options["device"] = "cpu"
        return func(*args, **options)


def _is_table(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    if func is torch.tensor:
        # The empty one is transformers' question for the device, whose answer "meta" saves it the
        # initialisation, which would replace functions of torch for all threads.
        return not isinstance(args[0], list) or bool(args[0])
    if func in (torch.zeros, torch.ones, torch.rand, torch.randn, torch.full):
        size = args[0] if args and not isinstance(args[0], int) else args
        return all(isinstance(n, int) for n in size) and math.prod(size) <= _MOST_REAL_NUMBERS
    return True


def skeleton(config: TransformersConfig) -> Any:
    """The model, its weights without memory, in evaluation mode and without gradients.

    Raises:
        UnsupportedModelError: transformers cannot build it.
    """
    try:
        with torch.device("meta"), _TablesWithMemory():
            model = config.model_class(config.hf_config)
    except Exception as error:
        msg = f"transformers cannot build {config.architecture!r}: {error}"
        raise UnsupportedModelError(msg) from error
    model.eval()
    return model.requires_grad_(False)


def fill_weights(
    model: Any,
    checkpoint: WeightSource,
    config: TransformersConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Give every weight memory on `device` and read it; move the tables there.

    Raises:
        CheckpointError: Tensors are missing or of the wrong shape.
        UnsupportedModelError: The checkpoint is stored in another layout than the model's.
    """
    names = checkpoint.names()
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    stored = _stored_names(model, names, tied, config)
    keeps_float32 = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for module_name, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for leaf, old in list(table.items()):
                if old is None:
                    continue
                name = f"{module_name}.{leaf}".lstrip(".")
                if name not in stored:
                    if table is module._buffers:
                        table[leaf] = _moved_table(name, old, device, config)
                    continue
                kind = torch.float32 if any(part in name for part in keeps_float32) else dtype
                if not old.is_floating_point():
                    kind = old.dtype
                new = torch.empty(tuple(old.shape), dtype=kind, device=device)
                checkpoint.read_into(stored[name], new)
                if table is module._parameters:
                    table[leaf] = torch.nn.Parameter(new, requires_grad=False)
                else:
                    table[leaf] = new
    for name, source in tied.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = model.get_parameter(source)


def _stored_names(
    model: Any,
    names: Mapping[str, Sequence[int]] | None,
    tied: Mapping[str, str],
    config: TransformersConfig,
) -> dict[str, str]:
    """Name in the model -> name in the checkpoint of every weight that is to be read."""
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}
    if names is None:
        return {name: name for name in wanted}
    prefix = f"{model.base_model_prefix}."
    found: dict[str, str] = {}
    for name in wanted:
        bare = name.removeprefix(prefix)
        if name in names or bare in names:
            found[name] = name if name in names else bare
    missing = sorted(wanted.keys() - found.keys())
    unknown = sorted(set(names) - set(found.values()) - set(tied))
    ignored = tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    unknown = [name for name in unknown if "inv_freq" not in name and not _matches(name, ignored)]
    if missing and unknown:
        msg = (
            f"The checkpoint stores {unknown[0]!r} where transformers' {config.architecture} has "
            f"{missing[0]!r}: a layout that is rearranged by from_pretrained alone. Save it once "
            "in the model's own: model.save_pretrained(folder, save_original_format=False)."
        )
        raise UnsupportedModelError(msg)
    if missing or unknown:
        what, name = ("lacks", missing[0]) if missing else ("has", unknown[0])
        more = f" and {len(missing or unknown) - 1} more" if len(missing or unknown) > 1 else ""
        verb = "has" if missing else "does not use"
        msg = f"The checkpoint {what} {name!r}{more}, which {config.architecture} {verb}."
        raise CheckpointError(msg)
    for name, shape in wanted.items():
        if tuple(names[found[name]]) != shape:
            msg = (
                f"Tensor {found[name]!r} has shape {tuple(names[found[name]])} in the checkpoint; "
                f"the config asks for {shape}."
            )
            raise CheckpointError(msg)
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    import re

    return any(re.search(pattern, name) for pattern in patterns)


def _moved_table(
    name: str, table: torch.Tensor, device: torch.device, config: TransformersConfig
) -> torch.Tensor:
    if table.is_meta:
        msg = f"{config.architecture} makes the table {name!r} in a way that was not foreseen."
        raise UnsupportedModelError(msg)
    return table.to(device)
