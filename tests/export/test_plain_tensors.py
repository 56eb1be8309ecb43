"""Int8 networks of eager and fx on plain tensors: results, requirements, errors."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from qat_lightning import Example, Recipe, load_quantized, quantize, to_plain_tensors
from qat_lightning.errors import ConfigurationError
from qat_lightning.modes.decomposed import int8
from qat_lightning.modes.decomposed.plain import PlainLayer
from qat_lightning.numerics.sqnr import sqnr_db
from tests.export.files import quantized_case

CASES = [("residual", "eager"), ("residual", "fx"), ("functional", "fx"), ("attention", "fx"), ("several_inputs", "fx")]


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as without a C++ compiler, with oneDNN's kernels one by one."""

    def fails(*given: object) -> object:
        raise RuntimeError("no g++")

    monkeypatch.setattr(int8, "compile_library", fails)


@pytest.mark.filterwarnings("ignore:The int8 network is not compiled")
@pytest.mark.parametrize(("case", "mode"), CASES)
def test_it_computes_what_the_packed_network_does(case: str, mode: str) -> None:
    packed, batch = quantized_case(case, mode)
    plain = to_plain_tensors(packed)
    assert (plain.recipe.mode, plain.network.runs) == ("pt2e", "onednn")
    for size in (1, 6):
        args, kwargs = batch(size)
        pairs = zip(tree_leaves(packed(*args, **kwargs)), tree_leaves(plain(*args, **kwargs)), strict=True)
        assert all(sqnr_db(one, other) > 25 for one, other in pairs)
    int8_layers = sum(row.quantized for row in packed.coverage)
    assert sum(isinstance(module, PlainLayer) for module in plain.network._compiled.modules()) == int8_layers
    assert plain.coverage == packed.coverage


@pytest.mark.filterwarnings("ignore:The int8 network is not compiled")
@pytest.mark.parametrize("mode", ["eager", "fx"])
def test_its_file_loads_without_the_networks_code_and_without_a_deprecated_dtype(mode: str, tmp_path: Path) -> None:
    packed, batch = quantized_case("residual", mode)
    plain = to_plain_tensors(packed)
    plain.save(tmp_path / "plain.int8")
    (x,), _ = batch(5)
    wanted = plain(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="The int8 network is not compiled")
        loaded = load_quantized(tmp_path / "plain.int8")
        found = _Dtypes()
        with found:
            assert torch.equal(loaded(x), wanted)
    assert torch.uint8 in found.dtypes
    assert not found.dtypes & {torch.quint8, torch.qint8, torch.qint32}


class _Dtypes(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects the dtypes of all operators' outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.dtypes |= {leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


def test_a_network_of_mode_pt2e_is_returned_as_it_is() -> None:
    network, _ = quantized_case("residual", "pt2e")
    assert to_plain_tensors(network) is network


def test_what_has_no_static_grids_is_refused_in_words() -> None:
    example = Example((torch.randn(4, 32),))
    network = quantize(nn.Sequential(nn.Linear(32, 4)), example, Recipe("fx", "x86", kind="weight_only"))
    with pytest.raises(ConfigurationError, match="static networks of mode 'eager' or 'fx'"):
        to_plain_tensors(network)
