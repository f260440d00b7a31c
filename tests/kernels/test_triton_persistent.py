"""The persistent decode kernel against the decoder's plain forward in float64.

That forward is itself compared with transformers (`tests/models/test_decoder_parity.py`). In the
interpreter programs run one after another, so the phases are launched one by one; on a GPU the
whole kernel runs as it does in production.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from kernel_cases import PADDING, make_metadata, metadata_on
from model_zoo import config_dict, hf_model
from triton_cases import IS_INTERPRETED, NEEDS_TRITON, kernels, on_gpu_only

from engine.kernels.metadata import AttentionMetadata
from engine.models.decoder import Decoder
from engine.models.registry import decoder_config

pytestmark = NEEDS_TRITON
DTYPES = [torch.float16, *on_gpu_only(torch.bfloat16)]
BLOCK_SIZE = 16
NUM_BLOCKS = 40
SIZES = {
    "max_position_embeddings": 1024,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
LAYERS = {
    "qwen3-window": {"head_dim": 32, "layer_types": ["sliding_attention", "full_attention"]},
    "llama-gelu-mqa": {"hidden_size": 96, "num_attention_heads": 3},
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "smollm3-list": {"no_rope_layers": [0, 1]},
}
PHASES = ("QKV", "ATTEND", "MERGE", "OUTPUT", "GATE_UP", "DOWN")
# ||got - want|| / ||want|| of the residual stream: each of 6 products and sums per layer rounds to
# the dtype, relatively 2^-12 or 2^-9, and the next layer passes the errors on; two layers.
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2.4e-2}
TILES = {
    "short_values": 512,
    "short_keys": 64,
    "long_block": 32,
    "long_split": 64,
    "max_splits": 8,
    "merge_splits": 2,
    "tile_values": 2048,
}


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if IS_INTERPRETED else "cuda")


class Case:
    """A tiny model in a dtype and in float64, with the same weights, caches and sequence."""

    def __init__(
        self, family: str, num_tokens: int, dtype: torch.dtype, device: torch.device, **sizes: Any
    ) -> None:
        config = decoder_config(
            config_dict(hf_model(family, **{**SIZES, **LAYERS.get(family, {}), **sizes}))
        )
        wide = torch.device("cpu")
        self.decoder, self.twin = (
            Decoder(config, device, dtype),
            Decoder(config, wide, torch.float64),
        )
        random = torch.Generator().manual_seed(num_tokens)
        pairs = zip(self.decoder.named_weights(), self.twin.named_weights(), strict=True)
        for (name, weight), (_, twin) in pairs:
            values = torch.randn(weight.shape, generator=random) * (
                0.3 if weight.dim() == 1 else 0.12
            )
            weight.copy_(values + (1.0 if "norm" in name else 0.0))
            twin.copy_(weight)
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        table = torch.randperm(NUM_BLOCKS, generator=random).tolist()[:num_blocks]
        seq = (num_tokens - 1, 1) if num_tokens else PADDING
        metadata = make_metadata([seq], BLOCK_SIZE, [table])
        # The table of a captured step: of all sequences, this one in some row.
        rows = torch.zeros(3, max(num_blocks, 1), dtype=torch.int32)
        rows[2] = metadata.block_table[0]
        captured = dataclasses.replace(
            metadata,
            block_table=rows,
            block_rows=torch.tensor([2]),
            device_counts=torch.tensor([1, 1], dtype=torch.int32),
        )
        self.metadata, self.twin_metadata = metadata_on(captured, device), metadata
        shape = self.decoder.kv_cache_shape(NUM_BLOCKS, BLOCK_SIZE)
        self.caches: list[tuple[torch.Tensor, torch.Tensor]] = []
        for _ in self.decoder.layers:
            planes = torch.full((2, *shape), float("nan"), dtype=dtype)
            if num_tokens:
                planes[:, table] = torch.randn(2, num_blocks, *shape[1:], generator=random).to(
                    dtype
                )
                last = (num_tokens - 1) % BLOCK_SIZE
                planes[:, table[-1], last:] = float("nan")  # what nobody wrote yet
            planes = planes.to(device)
            self.caches.append((planes[0], planes[1]))
        self.twin_caches = [(k.cpu().double(), v.cpu().double()) for k, v in self.caches]
        self.ids = torch.tensor([5], device=device)
        tiles = kernels("persistent_step").PersistentTiles(**TILES)
        from engine.models.persistent import persistent_step

        self.step = persistent_step(self.decoder, self.caches, tiles)

    def want(self) -> torch.Tensor:
        with torch.inference_mode():
            return self.twin.forward(self.ids.cpu(), self.twin_caches, self.twin_metadata)

    def run(self, phases: tuple[str, ...] = PHASES) -> torch.Tensor:
        """The normed result of one launch on a GPU, of a launch per phase in the interpreter."""
        with torch.inference_mode():
            if IS_INTERPRETED or phases != PHASES:
                return self.decoder.norm(self.run_phases(phases))
            return self.decoder.norm(self.step(self.ids, self.metadata))

    def run_phases(self, phases: tuple[str, ...]) -> torch.Tensor:
        kernel = kernels("persistent_decode")
        out = torch.full_like(self.decoder.embedding.weight[:1], float("nan"))

        def launch(name: str, layer: int) -> None:
            bit = getattr(kernel, name).value
            end = layer + (name in PHASES)
            self.step(self.ids, self.metadata, phases=bit, layers=(layer, end), out=out)

        launch("EMBED", 0)
        for layer in range(len(self.decoder.layers)):
            for name in phases:
                launch(name, layer)
        launch("FINISH", 0)
        return out


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.cpu().double() - want).norm() / want.norm())


CASES = [
    *(("llama", length) for length in (1, 16, 17, 33, 150)),
    *(
        (family, 70)
        for family in (
            "llama-biases",
            "llama-gelu-mqa",
            "mistral-window",
            "qwen3-window",
            "smollm3",
        )
    ),
    *on_gpu_only(("llama", 600), ("qwen2", 70), ("qwen2-window", 70), ("smollm3-list", 70)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "num_tokens"), CASES)
def test_layers_in_one_launch(
    device: torch.device, dtype: torch.dtype, family: str, num_tokens: int
) -> None:
    case = Case(family, num_tokens, dtype, device)
    want = case.want()
    got = case.run()
    assert error(got, want) < TOLERANCE[dtype]
    for pair, twins in zip(case.caches, case.twin_caches, strict=True):
        for cache, twin in zip(pair, twins, strict=True):
            written = cache.cpu().double()
            assert torch.equal(written.isnan(), twin.isnan()), "one token is stored, nothing else"
            assert error(written.nan_to_num(), twin.nan_to_num()) < TOLERANCE[dtype]
    if not IS_INTERPRETED:
        assert torch.equal(case.run(), got)


@pytest.mark.parametrize(
    ("tile_values", "pairs", "splits"), [(4096, 1, 4), (16384, 4, 2), (65536, 16, 1)]
)
def test_warps_along_a_row_and_along_the_pairs(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    tile_values: int,
    pairs: int,
    splits: int,
) -> None:
    monkeypatch.setitem(TILES, "tile_values", tile_values)
    monkeypatch.setattr(kernels("persistent_step"), "num_multiprocessors", lambda _: 2)
    case = Case("llama", 20, torch.float16, device, intermediate_size=1208)
    constants = case.step.constants(has_threads=not IS_INTERPRETED)
    assert (constants["DOWN_PAIRS"], constants["DOWN_SPLITS"]) == (pairs, splits)
    assert error(case.run(), case.want()) < TOLERANCE[torch.float16]
    monkeypatch.setattr(kernels("persistent_step"), "_MAX_HIDDEN_OF_A_WARP", 0)
    assert case.step.constants(has_threads=not IS_INTERPRETED)["DOWN_SPLITS"] == 4
    assert error(case.run(), case.want()) < TOLERANCE[torch.float16]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_waited_for_must_be_of_this_layer(device: torch.device) -> None:
    # Were a phase forgotten, its words would be those of the layer before.
    if not IS_INTERPRETED:
        pytest.skip("would wait for ever")
    case = Case("llama", 20, torch.float16, device)
    assert case.run(tuple(name for name in PHASES if name != "OUTPUT")).isnan().all()


def test_padding_stores_nothing(device: torch.device) -> None:
    case = Case("llama", 0, torch.float16, device)
    assert case.run().isfinite().all()
    assert all(cache.isnan().all() for pair in case.caches for cache in pair)


def test_epochs_start_again(device: torch.device) -> None:
    case = Case("llama", 70, torch.float16, device)
    num_layers = len(case.decoder.layers)
    want = case.run()
    assert case.step.workspace.epoch.item() == num_layers + 2
    case.step.last_epoch = 3 * num_layers
    assert (case.step.workspace.partial != 0).any()
    assert torch.equal(case.run(), want)
    assert case.step.workspace.epoch.item() == 1
    assert not case.step.workspace.partial.any()
    assert not case.step.workspace.stats.any()
    assert torch.equal(case.run(), want)


def test_sizes_that_have_no_tiles(device: torch.device) -> None:
    assert Case("llama", 5, torch.float16, device, intermediate_size=172).step is None
    assert Case("llama", 5, torch.float16, device, head_dim=24).step is None
    assert Case("llama", 5, torch.float16, device).step is not None


def test_only_lonely_decodes_run_so(device: torch.device) -> None:
    from engine.models.persistent import is_alone

    def metadata(*seqs: tuple[int, int]) -> AttentionMetadata:
        return make_metadata(list(seqs), BLOCK_SIZE, [[0, 1]] * len(seqs))

    assert is_alone(metadata((5, 1)))
    assert not is_alone(metadata((5, 1), (5, 1)))
    assert not is_alone(metadata((0, 5)))
    assert not is_alone(metadata((5, 1), (0, 3)))


def test_the_forward_takes_it_for_one_token(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    case = Case("llama", 20, torch.float16, device)
    module = kernels("persistent_step")
    if IS_INTERPRETED:
        # One program does everything in order, and waits for nobody.
        monkeypatch.setattr(module, "num_multiprocessors", lambda _: 1)
    monkeypatch.setattr(case.decoder, "_max_fused_tokens", 8)
    calls = []
    run = module.PersistentStep.__call__
    monkeypatch.setattr(
        module.PersistentStep, "__call__", lambda *args: (calls.append(1), run(*args))[1]
    )
    with torch.inference_mode():
        got = case.decoder.forward(case.ids, case.caches, case.metadata)
        assert error(got, case.want()) < TOLERANCE[torch.float16]
        assert torch.equal(case.decoder.forward(case.ids, case.caches, case.metadata), got)
        assert len(calls) == 2
        # Another engine's caches: the old ones are not read any more.
        copies = [(k.clone(), v.clone()) for k, v in case.caches]
        for pair in case.caches:
            for cache in pair:
                cache.fill_(float("nan"))
        assert torch.equal(case.decoder.forward(case.ids, copies, case.metadata), got)
        assert len(calls) == 3


@pytest.mark.skipif(IS_INTERPRETED, reason="needs a device")
@pytest.mark.parametrize("num_tokens", [70, 600])
def test_replays_and_neighbours_on_the_device(device: torch.device, num_tokens: int) -> None:
    cases = [Case("llama", num_tokens, torch.bfloat16, device) for _ in range(2)]
    graphs, outs, streams = [], [], []
    for case in cases:
        case.run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs.append(case.run())
        graphs.append(graph)
        streams.append(torch.cuda.Stream())
    want = cases[0].run()
    matrix = torch.randn(1024, 1024, device=device)
    torch.cuda.synchronize()
    for _ in range(300):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        matrix @ matrix
    torch.cuda.synchronize()
    assert torch.equal(outs[0], want)
    assert torch.equal(outs[1], want)
