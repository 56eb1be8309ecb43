"""The arithmetic of the integer layers, compared with upstream's flow and with the float layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.ao.quantization import PerChannelMinMaxObserver, PlaceholderObserver, QConfig, quantize_dynamic
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from qat_lightning.graph.example import Example
from qat_lightning.layers.integer import WeightGrid, integer_layer, why_not
from qat_lightning.layers.integer.weights import dequantize_rows, quantize_rows, restore, store
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.registry import get_mode
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.settings.backends import BACKENDS, pairs
from qat_lightning.settings.engines import engine_here, quantized_engine
from qat_lightning.settings.recipe import Recipe

DYNAMIC = Recipe("eager", "qnnpack", kind="dynamic")
WEIGHT_ONLY = Recipe("eager", "x86", kind="weight_only")


def upstream(module: nn.Module) -> nn.Module:
    """Upstream's flow, with its weight observer on -127..127."""
    qconfig = QConfig(
        activation=PlaceholderObserver.with_args(dtype=torch.quint8, is_dynamic=True),
        weight=PerChannelMinMaxObserver.with_args(
            dtype=torch.qint8, quant_min=-127, quant_max=127, qscheme=torch.per_channel_symmetric
        ),
    )
    # QNNPACK has all 8 bits of activations in upstream's layers as well.
    with quantized_engine("qnnpack"):
        network = nn.Sequential(copy.deepcopy(module))
        return quantize_dynamic(network, {nn.Linear: qconfig, nn.LSTM: qconfig, nn.GRU: qconfig})[0]


@pytest.mark.filterwarnings("ignore")
def test_linear_is_upstreams() -> None:
    layer, x = nn.Linear(24, 10), torch.randn(6, 24)
    ours, theirs = integer_layer(layer, DYNAMIC), upstream(layer)
    assert torch.equal(ours.integers, theirs.weight().int_repr())
    assert torch.allclose(ours.scales.double(), theirs.weight().q_per_channel_scales(), rtol=1e-6)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_upstreams(kind: type[nn.RNNBase]) -> None:
    layer, x = kind(12, 20, 2, bidirectional=True), torch.randn(5, 3, 12)
    ours, theirs = integer_layer(layer, DYNAMIC), upstream(layer)
    assert torch.allclose(ours(x)[0], theirs(x)[0], atol=1e-4)


@pytest.mark.parametrize("recipe", [DYNAMIC, WEIGHT_ONLY], ids=["dynamic", "weight_only"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_take_every_input(recipe: Recipe, kind: type[nn.RNNBase]) -> None:
    layer = kind(8, 6, 2, batch_first=True).eval()
    made = integer_layer(layer, recipe)
    x, state = torch.randn(3, 5, 8), torch.randn(2, 3, 6)
    hx = (state, state.clone()) if kind is nn.LSTM else state
    packed = pack_padded_sequence(x, torch.tensor([2, 5, 3]), batch_first=True, enforce_sorted=False)
    for args in ((x,), (x, hx), (x[0],)):
        wanted, got = layer(*args), made(*args)
        leaves = zip(torch.utils._pytree.tree_leaves(wanted), torch.utils._pytree.tree_leaves(got), strict=True)
        for one, other in leaves:
            assert torch.allclose(one, other, atol=0.05)
    for given_state in (None, hx):
        wanted, got = layer(packed, given_state), made(packed, given_state)
        assert torch.allclose(
            pad_packed_sequence(wanted[0], batch_first=True)[0],
            pad_packed_sequence(got[0], batch_first=True)[0],
            atol=0.05,
        )
        ends = (wanted[1][0], got[1][0]) if kind is nn.LSTM else (wanted[1], got[1])
        assert torch.allclose(*ends, atol=0.05)


@pytest.mark.parametrize("recipe", [DYNAMIC, WEIGHT_ONLY], ids=["dynamic", "weight_only"])
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "kdim": 6, "vdim": 10}, {"bias": False}], ids=str)
def test_attention_takes_every_argument(recipe: Recipe, options: dict) -> None:
    layer = nn.MultiheadAttention(8, 2, **options).eval()
    made = integer_layer(layer, recipe)
    first = options.get("batch_first", False)

    def batch(size: int, positions: int) -> torch.Tensor:
        return torch.randn(3, positions, size) if first else torch.randn(positions, 3, size)

    query, key, value = batch(8, 4), batch(options.get("kdim", 8), 5), batch(options.get("vdim", 8), 5)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False, True, False, False, True]])
    for settings in (
        {},
        {"need_weights": False},
        {"key_padding_mask": padding, "average_attn_weights": False},
        {"attn_mask": torch.ones(4, 5).triu(1).bool(), "key_padding_mask": padding},
        {"attn_mask": torch.randn(6, 4, 5)},
    ):
        wanted, got = layer(query, key, value, **settings), made(query, key, value, **settings)
        assert torch.allclose(wanted[0], got[0], atol=0.05), settings
        assert (wanted[1] is None) == (got[1] is None)
        if wanted[1] is not None:
            assert wanted[1].shape == got[1].shape
            assert torch.allclose(wanted[1], got[1], atol=0.05)
    one = (query[0], key[0], value[0]) if first else (query[:, 0], key[:, 0], value[:, 0])
    assert torch.allclose(layer(*one)[0], made(*one)[0], atol=0.05)


def test_attention_to_nothing_has_a_range() -> None:
    made, x = integer_layer(nn.MultiheadAttention(8, 2, batch_first=True), DYNAMIC), torch.randn(2, 3, 8)
    output, weights = made(x, x, x, key_padding_mask=torch.tensor([[True] * 3, [False] * 3]))
    assert torch.isfinite(output).all()
    assert not weights[0].any()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 3])
def test_bags(mode: str, padding: int | None) -> None:
    layer = nn.EmbeddingBag(20, 6, mode=mode, padding_idx=padding, include_last_offset=True)
    made = integer_layer(layer, WEIGHT_ONLY)
    indices, offsets = (
        torch.tensor([3, 5, 5, 19, 0, 3], dtype=torch.int32),
        torch.tensor([0, 2, 2, 6], dtype=torch.int32),
    )
    float_layer = copy.deepcopy(layer)
    float_layer.weight.data = made.weight
    weights = torch.randn(6) if mode == "sum" else None
    assert torch.allclose(made(indices, offsets, weights), float_layer(indices, offsets, weights), atol=1e-5)


def test_embeddings_refuse_indices_outside() -> None:
    made = integer_layer(nn.Embedding(4, 2), WEIGHT_ONLY)
    for index in (-1, 4):
        with pytest.raises((IndexError, RuntimeError), match="out of range"):
            made(torch.tensor([index]))


def test_inputs_of_one_dimension_and_none() -> None:
    for layer in (nn.Linear(5, 3), nn.GRUCell(5, 3), nn.LSTMCell(5, 3)):
        made = integer_layer(layer, DYNAMIC)
        wanted, got = layer(torch.ones(5)), made(torch.ones(5))
        one, other = (wanted[0], got[0]) if isinstance(layer, nn.LSTMCell) else (wanted, got)
        assert torch.allclose(one, other, atol=0.05)
    assert integer_layer(nn.Linear(5, 3), DYNAMIC)(torch.ones(0, 5)).shape == (0, 3)


@pytest.mark.parametrize("backend", ["x86", "fbgemm", "qnnpack"])
def test_weights_keep_to_the_limit_of_the_kernel(backend: str) -> None:
    recipe = Recipe("eager", backend, kind="dynamic")
    integers = integer_layer(nn.Linear(64, 8), recipe).integers
    assert integers.abs().max() == recipe.target.weight_limit
    assert (
        integer_layer(nn.Linear(64, 8), Recipe("eager", backend, kind="weight_only")).weight_integers.abs().max() == 127
    )


@pytest.mark.parametrize("recipe", [DYNAMIC, WEIGHT_ONLY], ids=["dynamic", "weight_only"])
def test_copies_and_pickles_compute_the_same(recipe: Recipe) -> None:
    made, x = integer_layer(nn.LSTM(5, 4), recipe), torch.randn(3, 2, 5)
    wanted = made(x)[0]
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(x)[0], wanted)
    fresh = integer_layer(nn.LSTM(5, 4), recipe)
    fresh(x)  # packs
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(fresh(x)[0], wanted)


def test_weight_only_keeps_no_float_weights_between_calls() -> None:
    made = integer_layer(nn.LSTM(50, 40), WEIGHT_ONLY)
    made(torch.randn(3, 2, 50))
    tensors = [*made.parameters(), *(flat for flat in made.layer._flat_weights if flat is not None)]
    assert all(tensor.dim() == 1 for tensor in tensors)


GRIDS = st.builds(
    lambda bits, symmetric, group, clipped: WeightGrid(
        -(2 ** (bits - 1) - 1) if symmetric else -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, symmetric, group, clipped
    ),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([-1, 0, 4, 16]),
    st.booleans(),
)


@given(grid=GRIDS, rows=st.integers(1, 4), values=st.integers(1, 37), seed=st.integers(0, 99))
def test_grid_holds_every_weight(grid: WeightGrid, rows: int, values: int, seed: int) -> None:
    """In float64: every value is within half a step of its weight unless it was clipped, and 0 stays 0."""
    weight = torch.randn(rows, values, generator=torch.Generator().manual_seed(seed))
    weight[0, 0] = 0.0
    integers, scales, zero_points = quantize_rows(weight, grid)
    assert integers.min() >= grid.quant_min
    assert integers.max() <= grid.quant_max
    stored = store(integers, grid)
    assert torch.equal(restore(stored, values, grid)[:, :values], integers)
    points = None if grid.symmetric else zero_points
    got = dequantize_rows(stored, scales, points, values, grid).double()
    assert got[0, 0] == 0
    group = grid.group if grid.group > 0 else max(values, 1)
    steps = scales.double().repeat_interleave(group, 1)[:, :values]
    inside = (integers > grid.quant_min) & (integers < grid.quant_max)
    error = (got - weight.double()).abs()
    assert (error[inside] <= 0.5001 * steps[inside]).all()
    if not grid.clipped:
        assert (error <= (0.5001 if grid.symmetric else 1.0001) * steps).all()


@pytest.mark.parametrize("values", [(-200, 127), (5, 5), (-127, 300), (True, 3), (-127.0, 127)])
def test_grids_that_no_byte_holds(values: tuple) -> None:
    with pytest.raises(ValueError, match="is not a grid"):
        WeightGrid(*values)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_transposed_convolutions_name_what_quantizes_them(kind: type[nn.Module]) -> None:
    layer: nn.Module = kind(4, 4, 3)  # type: ignore[call-arg]
    reason = why_not(layer, Recipe("eager", "x86", kind="dynamic"))
    in_pt2e = ("xnnpack",) if kind is nn.ConvTranspose3d else ("xnnpack", "x86")
    named = " or ".join(repr(backend) for backend in in_pt2e)
    assert (
        "mode='fx' or mode='eager', "
        f"or with mode='pt2e' and backend={named}, quantizes it, kind='weight_only' its weight" in reason
    )
    assert not why_not(layer, Recipe("eager", "x86", kind="weight_only"))
    example = Example((torch.randn(4, 4, *[5] * (layer.weight.dim() - 2)),))
    for mode, backend in pairs():
        if BACKENDS[backend].own_grids:
            continue
        flow, network = get_mode(mode), nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), copy.deepcopy(layer))
        prepared = flow.prepare(network, example, Recipe(mode, backend, kind="static"))
        calibrate(prepared, [example])
        rows = {row.name: row.quantized for row in flow.coverage(cpu_copy(prepared), example)}
        everywhere = mode != "pt2e" and (
            kind is not nn.ConvTranspose3d or engine_here(BACKENDS[backend].engine) != "qnnpack"
        )
        assert rows["3"] == (everywhere or (mode == "pt2e" and backend in in_pt2e)), (mode, backend)


@pytest.mark.parametrize("group", [2, 16, 1024])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_padding_of_groups_is_not_stored(bits: int, group: int) -> None:
    half = 2 ** (bits - 1) - 1
    grid, weight = WeightGrid(-half, half, group=group), torch.randn(3, 33)
    integers, scales, _ = quantize_rows(weight, grid)
    stored = store(integers, grid)
    assert stored.numel() == 3 * (17 if bits == 4 else 33)
    assert [tuple(part.shape) for part in (stored, scales)] == [tuple(part.shape) for part in grid.empty(3, 33)]
    assert (dequantize_rows(stored, scales, None, 33, grid) - weight).abs().max() <= scales.max() * 0.5001
