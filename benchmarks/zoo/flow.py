"""The test of one network: fit, convert, save and load; and the same with PyTorch's own tools."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from benchmarks.training import silent, trainer
from benchmarks.zoo.networks import build
from qat_lightning import QuantizationAwareTraining, load_quantized
from qat_lightning.modes.coverage import int8_share
from qat_lightning.modes.protocol import LayerCoverage

Note = Callable[..., None]
"""Records facts about a network; they are kept even if time runs out later."""

BATCH = 2
"""Smallest batch size with which BatchNorm trains."""


def _loss(output: Any) -> Tensor:
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.stack([leaf.square().mean() for leaf in leaves]).sum()


class _Lit(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return _loss(self.net(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class _Clock(Callback):
    """Records when training began and ended, and the number of steps."""

    def __init__(self, note: Note) -> None:
        self.note, self.began = note, time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note(stage="fit", prepare_s=round(time.monotonic() - self.began, 1))

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.note(steps=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ended = time.monotonic()
        self.note(stage="convert")


def _largest_float(rows: list[LayerCoverage]) -> list[list[Any]]:
    """Return float layers with the most multiply-accumulates: type, reason, share in %, one of the names."""
    total = sum(row.macs or 0 for row in rows) or 1
    groups: dict[tuple[str, str], tuple[int, str]] = {}
    for row in rows:
        if not row.quantized and row.macs:
            key = (row.kind, row.reason)
            groups[key] = (groups.get(key, (0, ""))[0] + row.macs, row.name)
    found = sorted(groups.items(), key=lambda item: -item[1][0])[:4]
    return [[kind, reason[:300], round(100 * macs / total, 1), name] for (kind, reason), (macs, name) in found]


def ours(name: str, mode: str, small: bool, note: Note) -> None:
    """Run two steps of quantization-aware training, convert, save, and load the file."""
    silent()
    warnings.filterwarnings("ignore")
    note(stage="build")
    network, size = build(name, small)
    note(input=list(size), stage="prepare")
    torch.manual_seed(1)
    batches = [torch.randn(BATCH, *size) for _ in range(2)]
    qat, clock = QuantizationAwareTraining(mode=mode, backend="x86"), _Clock(note)
    trainer(1, [qat, clock], gradient_clip_val=1.0).fit(_Lit(network), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    quantized = qat.quantized
    assert quantized is not None, "the fit made no int8 network"
    rows = [*quantized.coverage, *quantized.operations]
    whole = quantized.whole
    note(
        stage="save",
        convert_s=round(time.monotonic() - clock.ended, 1),
        took=quantized.recipe.mode,
        why="\n".join(decision.why for decision in qat._networks.decisions.values()),
        share=int8_share(rows),
        left=_largest_float(rows),
        layers=[sum(row.quantized for row in quantized.coverage), len(quantized.coverage)],
        checks=len(quantized.checks),
        whole_db=None if whole is None else whole.sqnr_db,
        draws=None if whole is None else list(whole.draws),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.int8"
        quantized.save(path)
        note(stage="load", megabytes=round(path.stat().st_size / 1e6, 2))
        loaded = load_quantized(path)
        note(stage="compare")
        one, other = (tree_leaves(module(batches[0])) for module in (quantized, loaded))
        assert len(one) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), "loaded, it computes something else"
    note(stage="done")


def _two_steps(network: nn.Module, batches: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)
    for batch in batches:
        optimizer.zero_grad()
        _loss(network(batch)).backward()
        optimizer.step()


def _upstream_fx(network: nn.Module, batches: list[Tensor]) -> nn.Module:
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

    prepared = prepare_qat_fx(network, get_default_qat_qconfig_mapping("x86"), (batches[0],))
    _two_steps(prepared, batches)
    return convert_fx(prepared.eval())


def _upstream_pt2e(network: nn.Module, batches: list[Tensor]) -> nn.Module:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

    exported = torch.export.export(network, (batches[0],), strict=True).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    prepared = prepare_qat_pt2e(exported, quantizer)
    _two_steps(prepared, batches)
    move_exported_model_to_eval(prepared)
    converted: nn.Module = convert_pt2e(prepared)
    return converted


def upstream(name: str, peer: str, small: bool, note: Note) -> None:
    """Run two steps and convert with PyTorch's own tools, as documented; the int8 network runs once."""
    silent()
    warnings.filterwarnings("ignore")
    note(stage="build")
    network, size = build(name, small)
    torch.manual_seed(1)
    batches = [torch.randn(BATCH, *size) for _ in range(2)]
    began = time.monotonic()
    note(input=list(size), stage="prepare and convert")
    converted = {"upstream fx": _upstream_fx, "upstream pt2e": _upstream_pt2e}[peer](network, batches)
    with torch.no_grad():
        output = converted(batches[0])
    assert all(torch.isfinite(leaf).all() for leaf in tree_leaves(output)), "the int8 network's output is not finite"
    note(stage="done", prepare_s=round(time.monotonic() - began, 1))


def run(name: str, mode: str, small: bool, note: Note) -> None:
    """Test one network in one mode, or with another tool."""
    os.environ.setdefault("QAT_LIGHTNING_COMPILE", "0")
    (upstream if mode.startswith("upstream") else ours)(name, mode, small, note)
