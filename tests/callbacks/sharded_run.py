"""Program of `test_sharded`: fits with ModelParallelStrategy in two processes, and the same fits with DDP."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import TensorDataset

from qat_lightning import (
    Distillation,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    QuantizationMonitor,
    QuantizedModelExport,
    Scheme,
    evaluate_variants,
    float_state_dict,
)
from qat_lightning.demos.data.resumable import resumable_loader
from qat_lightning.demos.networks.char_transformer import CausalBlock, CharTransformer
from qat_lightning.modes.sharded import reshard
from tests.callbacks.lit import Lit, Net, dataset, loader, trainer
from tests.callbacks.test_insert import OwnForward
from tests.callbacks.test_trained_kinds import Rows

FOUR_BITS = Scheme(
    weight_bits=4, weight_granularity="per_group", weight_group_size=16, weight_observer="mse", weight_symmetric=False
)
CLIPPED = "weight-only, 4 bits in clipped groups"
KINDS: dict[str, dict[str, Any]] = {
    "dynamic": {"kind": "dynamic"},
    "weight-only": {"kind": "weight_only"},
    CLIPPED: {"kind": "weight_only", "scheme": FOUR_BITS},
    "static": {"kind": "static", "freeze_observers": {"step": 6}},
}


def tokens() -> Tensor:
    return torch.randint(0, 32, (64, 9), generator=torch.Generator().manual_seed(0))


class Language(LightningModule):
    """Predicts the next token; each process has half of an epoch, from any step on."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.net = CharTransformer(num_tokens=32, context=8, dim=16, depth=2, heads=2)
        if tied:
            self.net.head.weight = self.net.tokens.weight

    def _loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[1].flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self._loss(batch), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", self._loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)

    def _data(self, **settings: Any) -> Any:
        of = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
        pairs = TensorDataset(tokens()[:, :-1], tokens()[:, 1:])
        return resumable_loader(pairs, batch_size=8, seed=1, **of, **settings)

    def train_dataloader(self) -> Any:
        return self._data(shuffle=True)

    def val_dataloader(self) -> Any:
        return self._data(shuffle=False)

    test_dataloader = val_dataloader


class ShardedLanguage(Language):
    settings: ClassVar[Mapping[str, Any]] = {}

    def configure_model(self) -> None:
        if isinstance(self.net, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in [module for module in self.net.modules() if isinstance(module, CausalBlock)]:
            self.shard_block(block, mesh=mesh, **self.settings)
        fully_shard(self.net, mesh=mesh, **self.settings)

    def shard_block(self, block: nn.Module, **settings: Any) -> None:
        fully_shard(block, **settings)


class Recomputing(ShardedLanguage):
    """Uses activation checkpointing in its blocks."""

    def shard_block(self, block: nn.Module, **settings: Any) -> None:
        checkpoint(block)
        super().shard_block(block, **settings)


class InBfloat16(ShardedLanguage):
    settings: ClassVar = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}


class Adapted(Language):
    def __init__(self) -> None:
        super().__init__()
        self.net = get_peft_model(self.net, LoraConfig(r=4, target_modules=["query", "value", "out", "mlp.0"]))


class ShardedAdapted(Adapted, ShardedLanguage):
    pass


class ShardedLit(Lit):
    def configure_model(self) -> None:
        if not isinstance(self.net, FSDPModule):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class ShardedOwnForward(OwnForward):
    def configure_model(self) -> None:
        if not isinstance(self, FSDPModule):
            fully_shard(self, mesh=self.device_mesh["data_parallel"])


def sharding(whole_files: bool = False) -> ModelParallelStrategy:
    return ModelParallelStrategy(2, 1, save_distributed_checkpoint=not whole_files)


def qat(mode: str = "eager", **settings: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(mode=mode, **{"start": {"step": 2}, **settings})


def whole(module: nn.Module) -> dict[str, Tensor]:
    state = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    return {key: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for key, v in state.items()}


def farthest(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """The largest difference between two states with the same keys."""
    assert left.keys() == right.keys()
    return max((left[key].double() - right[key].double()).abs().max().item() for key in left if left[key].numel())


def fit(
    make: Callable[[], Any], strategy: Any, *others: Any, ckpt: Any = None, seed: int = 0, **settings: Any
) -> tuple[Any, Any, Any]:
    torch.manual_seed(seed)
    module, callback = make(), qat(**settings)
    saves = any(isinstance(other, ModelCheckpoint) for other in others)
    two = trainer(callback, *others, strategy=strategy, devices=2, enable_checkpointing=saves)
    two.fit(module, ckpt_path=None if ckpt is None else str(ckpt))
    return two, module, callback


def losses_of(two: Any, module: Any, callback: Any) -> dict[str, Any]:
    """The loss of each variant, and the result of `validate`."""
    found = {}
    for variant in callback.variants:
        callback.use_variant(variant)
        found[variant] = two.test(module, verbose=False)[0]["test/loss"]
    callback.use_variant(None)
    found["validated"] = two.validate(module, verbose=False)[0]["val/loss"]
    return found


def run_beside_ddp(kind: str, tied: bool) -> dict[str, Any]:
    two, module, callback = fit(lambda: ShardedLanguage(tied), sharding(), **KINDS[kind])
    sharded, int8 = whole(module), callback.quantized(tokens()[:4, :-1])
    losses = losses_of(two, module, callback)
    reshard(module)
    found: dict[str, Any] = {"sharded": all(isinstance(parameter, DTensor) for parameter in module.parameters())}
    found |= {"losses": losses, "fidelity": callback.fidelity["agreement"]}
    two, module, callback = fit(lambda: Language(tied), "ddp", **KINDS[kind])
    found["weights"] = farthest(sharded, whole(module))
    found["int8"] = (int8 - callback.quantized(tokens()[:4, :-1])).abs().max().item()
    return found | {"losses of ddp": losses_of(two, module, callback)}


def run_all_beside_ddp(kind: str, folder: Path) -> dict[str, Any]:
    return {str(tied): run_beside_ddp(kind, tied) for tied in (False, True)}


def run_resumed(kind: str, folder: Path) -> dict[str, Any]:
    """Resume from checkpoints of each form, with the same strategy and with others."""
    settings, found, ended = KINDS[kind], {}, []

    def saving(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(folder / kind / name, filename="{step}", save_top_k=-1, every_n_train_steps=1)

    ways = {
        "sharded": (ShardedLanguage, lambda: sharding()),
        "whole": (ShardedLanguage, lambda: sharding(whole_files=True)),
        "ddp": (Language, lambda: "ddp"),
    }
    for name, (make, strategy) in ways.items():
        _, module, callback = fit(make, strategy(), saving(name), **settings)
        ended.append((whole(module), callback.quantized(tokens()[:4, :-1])))

    def same(module: Any, callback: Any) -> bool:
        state, int8 = whole(module), callback.quantized(tokens()[:4, :-1])
        return farthest(state, ended[0][0]) == 0.0 and torch.equal(int8, ended[0][1])

    found["fits"] = [farthest(state, ended[0][0]) for state, _ in ended]
    for saved, way, step in (
        *((name, name, step) for name in ("sharded", "whole") for step in (1, 2, 4, 5)),
        *(("whole", "sharded", 3), ("sharded", "whole", 3), ("ddp", "sharded", 3), ("whole", "ddp", 3)),
    ):
        make, strategy = ways[way]
        ckpt = folder / kind / saved / f"step={step}.ckpt"
        _, module, callback = fit(make, strategy(), ckpt=ckpt, seed=3, **settings)
        found[f"{saved} to {way}, {step}"] = same(module, callback)
        assert callback.float_source == "the weights before step 2, when fake-quantization was enabled"
    torch.manual_seed(5)
    module, callback = ShardedLanguage(), qat(**settings)
    ckpt = folder / kind / "sharded" / "step=8.ckpt"
    trainer(callback, strategy=sharding(), devices=2).test(module, ckpt_path=str(ckpt), verbose=False)
    found["tested"] = same(module, callback) and "step=8.ckpt" in callback._int8.made_from
    state = float_state_dict(ckpt)
    Language().load_state_dict(state)
    found["float part"] = all(torch.equal(value, ended[0][0][key]) for key, value in state.items())
    return found


def run_images() -> dict[str, Any]:
    """The differences to DDP for other networks."""

    def end(make: Callable[[], Any], strategy: Any, *others: Any, **settings: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module, callback = make(), qat(**settings)
        two = trainer(callback, *others, strategy=strategy, devices=2)
        two.fit(module, loader(), loader())
        assert two.test(module, loader(), verbose=False)[0]["test/acc"] > 0.3
        return whole(module) | {"int8": callback.quantized(dataset()[:8][0])}

    rows = {
        "conv static": (lambda: ShardedLit(Net()), lambda: Lit(Net()), {"kind": "static"}),
        "own forward": (ShardedOwnForward, OwnForward, {"kind": "weight_only", "module": "."}),
        "attention": (lambda: ShardedLit(Rows()), lambda: Lit(Rows()), {"kind": "dynamic"}),
        "fx": (lambda: ShardedLit(Net()), lambda: Lit(Net()), {"kind": "dynamic", "mode": "fx"}),
        "pt2e": (lambda: ShardedLit(Net()), lambda: Lit(Net()), {"kind": "weight_only", "mode": "pt2e"}),
    }
    found = {}
    for name, (sharded, plain, settings) in rows.items():
        settings = settings | {"freeze_batchnorm": {"step": 2}}
        found[name] = farthest(end(sharded, sharding(), **settings), end(plain, "ddp", **settings))
    for start in (0, {"step": 1}):
        settings = {"kind": "dynamic", "start": start}
        others = [Distillation(2.0, 0.5, features=["net.features"]) for _ in range(2)]
        left = end(lambda: ShardedLit(Net()), sharding(), others[0], **settings)
        found[f"distilled from {start}"] = farthest(left, end(lambda: Lit(Net()), "ddp", others[1], **settings))
    return found


def run_variations() -> dict[str, Any]:
    """Other ways to train the language model."""

    def end(make: Callable[[], Any], strategy: Any, **settings: Any) -> dict[str, Tensor]:
        _, module, callback = fit(make, strategy, **{"kind": "weight_only", **settings})
        return whole(module) | {"int8": callback.quantized(tokens()[:4, :-1])}

    found = {"recomputing": farthest(end(Recomputing, sharding()), end(Language, "ddp"))}
    for adapters in ("merged", "float"):
        given = {"adapters": adapters, "module": "net"}
        left, right = end(ShardedAdapted, sharding(), **given), end(Adapted, "ddp", **given)
        found[f"adapters, {adapters}"] = farthest(left, right)
    for kind in KINDS:
        two, module, callback = fit(InBfloat16, sharding(), **KINDS[kind])
        two.test(module, verbose=False)
        found[f"bfloat16, {kind}"] = callback.fidelity
    return found


def run_tools(folder: Path) -> dict[str, Any]:
    """Uses of weights besides training: monitor, export, coverage, variants, manual conversion."""
    torch.manual_seed(0)
    module, callback = ShardedLit(Rows()), qat(kind="dynamic")
    monitor, export = (
        QuantizationMonitor(every_n_steps=1),
        QuantizedModelExport(["torchscript"], str(folder / "export")),
    )
    two = trainer(callback, monitor, export, strategy=sharding(), devices=2)
    two.fit(module, loader(), loader())
    found: dict[str, Any] = {"monitored": [row.layer for row in monitor.layers]}
    found["exported"] = {name: result.passed for name, result in export.results.items()}
    found["summary"] = {k: v for k, v in evaluate_variants(two, module, dataloaders=loader()).items() if "acc" in k}
    found["coverage"] = [row.name for row in callback.coverage if row.quantized]
    images = dataset()[:8][0]
    fake_quant, int8 = callback.network("fake_quant")(images), callback.network("int8")(images)
    found["network"] = (fake_quant - int8).abs().max().item()
    found["without"] = [row.name for row in callback.convert(exclude=["net.head"]).coverage if row.quantized]
    two.fit(module, loader())
    found["again"] = [row.name for row in callback.quantized.coverage if row.quantized]
    return found


class Late(Lit):
    """Builds its network in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        self.net = Net()
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Replacing(Lit):
    def configure_model(self) -> None:
        self.net = nn.Sequential(self.net, nn.Identity())


class Apart(Lit):
    def configure_model(self) -> None:
        fully_shard(self.net.features[1], mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class OnMeta(ShardedLit):
    def __init__(self) -> None:
        with torch.device("meta"):
            super().__init__()


def run_refused(folder: Path) -> dict[str, str]:
    """The message of each error, and the number of steps before it."""
    said: dict[str, str] = {}

    def refuse(name: str, make: Callable[[], Any], callback: Any, strategy: Any = None, ckpt: Any = None) -> Any:
        two = trainer(callback, strategy=strategy or sharding(), devices=2)
        module = make()
        try:
            two.fit(module, None if isinstance(module, Language) else loader(), ckpt_path=ckpt and str(ckpt))
        except Exception as error:  # noqa: BLE001 - the test looks at it
            said[name] = f"{two.global_step} {type(error).__name__}: {error}"
        return module

    tensors = ModelParallelStrategy(1, 2)
    refuse("tensor parallel", ShardedLit, qat(kind="dynamic"), tensors)
    refuse("static in fx", ShardedLit, qat("fx"))
    refuse("bias correction", ShardedLit, qat(bias_correction_batches=1))
    refuse("calibration", ShardedLit, PostTrainingQuantization())
    refuse("late", Late, qat(kind="dynamic"))
    refuse("late, named", Late, qat(kind="dynamic", module="net"))
    refuse("meta", OnMeta, qat(kind="dynamic"))
    refuse("replacing", Replacing, qat(kind="dynamic"))
    refuse("apart", Apart, qat())
    module = refuse("not refused", ShardedLit, qat(kind="dynamic"))
    refuse("taken over", lambda: module, qat(kind="dynamic"))
    refuse("taken over with an example", lambda: module, qat(kind="dynamic", example_inputs=dataset()[:4][0]))
    plain = ShardedLit()
    trainer(strategy=sharding(), devices=2).fit(plain, loader())
    refuse("sharded before", lambda: plain, qat(kind="dynamic"))
    for name, whole_files in (("sharded", False), ("whole", True)):
        saving = ModelCheckpoint(folder / "clipped" / name, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        fit(ShardedLanguage, sharding(whole_files), saving, **KINDS[CLIPPED])
        ckpt = folder / "clipped" / name / "step=4.ckpt"
        refuse(f"other kind, {name}", ShardedLanguage, qat(kind="dynamic"), ckpt=ckpt)
    return said | run_from_float(folder, refuse)


def run_from_float(folder: Path, refuse: Callable[..., Any]) -> dict[str, str]:
    """Checkpoints of float runs, and the remedy in the messages."""
    found = {}
    for name, whole_files in (("sharded", False), ("whole", True)):
        saving = ModelCheckpoint(folder / "float" / name, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        torch.manual_seed(0)
        two = trainer(saving, strategy=sharding(whole_files), devices=2, enable_checkpointing=True)
        two.fit(ShardedLanguage())
        ckpt = folder / "float" / name / "step=4.ckpt"
        clipped = qat(kind="weight_only", scheme=FOUR_BITS)
        refuse(f"float, {name}", ShardedLanguage, clipped, ckpt=ckpt)
        module = ShardedLanguage()
        module.load_state_dict(float_state_dict(ckpt))
        remedied = qat(kind="weight_only", scheme=FOUR_BITS)
        trainer(remedied, strategy=sharding(), devices=2).fit(module)
        found[f"float, {name}, remedied"] = str(remedied.quantized is not None)
    _, left, _ = fit(ShardedLanguage, sharding(), ckpt=ckpt, kind="weight_only", start=0)
    _, right, _ = fit(Language, "ddp", ckpt=ckpt, kind="weight_only", start=0)
    return found | {"float, whole, nothing added": str(farthest(whole(left), whole(right)))}


SECTIONS: dict[str, Callable[[Path], dict[str, Any]]] = {
    **{f"beside, {kind}": partial(run_all_beside_ddp, kind) for kind in KINDS},
    **{f"resumed, {kind}": partial(run_resumed, kind) for kind in (CLIPPED, "static")},
    "images": lambda folder: run_images(),
    "variations": lambda folder: run_variations(),
    "tools": run_tools,
    "refused": run_refused,
}


if __name__ == "__main__":
    results = SECTIONS[sys.argv[2]](Path(sys.argv[1]))
    Path(sys.argv[1], f"{torch.distributed.get_rank()}.json").write_text(json.dumps(results))
