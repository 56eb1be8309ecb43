"""Networks of transformers that learn from their float versions: from outputs, and from hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

pytest.importorskip("transformers")

from lightning.pytorch.callbacks import ModelCheckpoint

from qat_lightning import Distillation, QuantizationAwareTraining, Scheme
from qat_lightning.errors import ConfigurationError
from qat_lightning.recipes.blocks import repeated_blocks
from qat_lightning.recipes.distillation import Distiller
from tests.hf.networks import MAKE, Lit, batches, generate, llama, trainer
from tests.support.nightly import nightly_except

W4 = Scheme(weight_bits=4, weight_granularity="per_group", weight_group_size=16, weight_observer="min_max")


class Watch(Callback):
    """Records the distillation losses, and the teacher's calls."""

    def __init__(self, distillation: Distillation) -> None:
        self.distillation = distillation
        self.losses: list[float] = []
        self.called: list[str] = []
        self.watched: set[Distiller] = set()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if "quant/distillation_loss" in trainer.callback_metrics:
            self.losses.append(float(trainer.callback_metrics["quant/distillation_loss"]))
        for distiller in self.distillation._distillers.values():
            if distiller not in self.watched:
                self.watched.add(distiller)
                for name, module in distiller.teacher.named_modules():
                    module.register_forward_pre_hook(lambda *_, name=name: self.called.append(name))


def _taught(module: Lit, distillation: Distillation, name: str = "llama", **settings: Any) -> tuple[Watch, Any]:
    watch, run_with = Watch(distillation), settings.pop("trainer", {})
    qat = QuantizationAwareTraining(**{"mode": "eager", "kind": "weight_only", "scheme": W4, **settings})
    trainer(qat, distillation, watch, **run_with).fit(module, batches(name))
    assert watch.losses
    assert all(loss > 0 for loss in watch.losses)
    return watch, qat


@pytest.mark.parametrize("name", ["llama", "bert", pytest.param("t5", marks=pytest.mark.slow)])
def test_scores_are_found_in_a_model_output(name: str) -> None:
    """Compared with the divergence by hand, over the tokens at each position, without loss and cache."""
    torch.manual_seed(0)
    student, teacher, batch = MAKE[name](), MAKE[name](), next(iter(batches(name)))
    distiller = Distiller(student, teacher, Distillation(temperature=2.0).settings)
    got = (distiller.run(student.forward, **batch).logits / 2).log_softmax(-1)
    with torch.no_grad():
        wanted = (teacher(**batch).logits / 2).log_softmax(-1)
    expected = 4 * (wanted.exp() * (wanted - got)).sum(-1).mean()
    loss = distiller.take_loss()
    assert loss is not None
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("llama", "eager"), *(pytest.param(name, "fx", marks=pytest.mark.slow) for name in ("llama", "bert"))],
)
def test_a_network_learns_from_outputs(name: str, mode: str) -> None:
    network = llama(use_cache=False) if name == "llama" else MAKE[name]()
    watch, qat = _taught(Lit(network), Distillation(), name, mode=mode)
    assert "" in watch.called
    assert qat.quantized is not None


def test_the_teacher_of_hidden_states_never_runs_its_head() -> None:
    module = Lit(llama(num_hidden_layers=2, tie_word_embeddings=False))
    watch, qat = _taught(module, Distillation(features="blocks", weight=0.0))
    assert {"model.layers.0", "model.layers.1"} <= set(watch.called)
    assert not {"model.norm", "lm_head"} & set(watch.called)
    assert generate(module.eval().network, 8) == generate(qat.quantized, 8)
    assert not any(inner._forward_hooks for inner in module.network.modules() if type(inner).__name__ != "Linear")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("bert", "dynamic"), ("vit", "weight_only"), pytest.param("t5", "weight_only", marks=pytest.mark.slow)],
)
def test_blocks_of_other_networks(name: str, kind: str) -> None:
    _taught(Lit(MAKE[name]()), Distillation(features="blocks", weight=0.0), name, kind=kind)


@pytest.mark.slow
@pytest.mark.parametrize("name", nightly_except(["bert", "vit"], "bert"))
def test_blocks_in_a_graph(name: str) -> None:
    distillation = Distillation(features="blocks", weight=0.0)
    _taught(Lit(MAKE[name]()), distillation, name, mode="fx", kind="static", scheme=Scheme())


def test_which_blocks() -> None:
    assert repeated_blocks(llama(num_hidden_layers=2)) == ("model.layers.0", "model.layers.1")
    assert repeated_blocks(MAKE["t5"]()) == ("decoder.block.0",)
    with pytest.raises(ConfigurationError, match="finds no list of repeated blocks in Linear"):
        repeated_blocks(torch.nn.Linear(2, 2))


def test_hidden_states_under_gradient_checkpointing() -> None:
    """Blocks of transformers use checkpointing internally; their first forward may run without gradients."""

    def losses(features: Any, **checkpointing: bool) -> list[float]:
        torch.manual_seed(0)
        module = Lit(llama(use_cache=False))
        if checkpointing:
            module.network.gradient_checkpointing_enable(checkpointing)
        return _taught(module, Distillation(features=features, weight=0.0), trainer={"max_epochs": 1})[0].losses

    inside = ["network.model.layers.0.mlp"]
    assert losses("blocks", use_reentrant=True) == pytest.approx(losses("blocks"), rel=1e-4)
    assert losses(inside, use_reentrant=False) == pytest.approx(losses(inside), rel=1e-4)
    with pytest.raises(ConfigurationError, match="use_reentrant=False"):
        losses(inside, use_reentrant=True)


def _adapted(**settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **settings)
    return peft.get_peft_model(llama(tie_word_embeddings=False), lora)


@pytest.mark.parametrize("start", [0, {"step": 2}])
@pytest.mark.parametrize("distillation", [{}, {"features": "blocks", "weight": 0.0}], ids=["outputs", "blocks"])
@pytest.mark.parametrize("adapters", ["merged", pytest.param("float", marks=pytest.mark.slow)])
def test_the_teacher_of_adapters_shares_the_frozen_base(
    adapters: str, distillation: dict[str, Any], start: Any
) -> None:
    class Bases(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            for distiller in learning._distillers.values():
                own = {id(parameter) for parameter in pl_module.parameters()}
                for name, parameter in distiller.teacher.named_parameters():
                    assert (id(parameter) in own) is ("lora" not in name), name
                    seen.append(name)

    seen: list[str] = []
    learning = Distillation(**distillation)
    module = Lit(_adapted())
    adapter = {key: value.clone() for key, value in module.state_dict().items() if "lora_A" in key}
    qat = QuantizationAwareTraining(mode="eager", kind="weight_only", scheme=W4, start=start, adapters=adapters)
    trainer(qat, learning, Bases()).fit(module, batches())
    assert seen
    assert any(not torch.equal(module.state_dict()[key], value) for key, value in adapter.items())
    assert all("lora" in key for key in next(iter(learning.state_dict()["weights"].values()), {}))


def test_a_base_that_trains_while_its_teacher_shares_it_is_refused() -> None:
    class Unfreeze(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 2:
                pl_module.network.requires_grad_(True)

    qat = QuantizationAwareTraining(mode="eager", kind="weight_only", scheme=W4)
    with pytest.raises(ConfigurationError, match="was frozen when fake-quantization was enabled, and is trained now"):
        trainer(qat, Distillation(), Unfreeze()).fit(Lit(_adapted()), batches())


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, {"epoch": 1}])
def test_a_resumed_training_of_adapters_has_the_same_teacher(start: Any, tmp_path: Path) -> None:
    def fit(epochs: int, path: Path | None = None) -> dict[str, Any]:
        module = Lit(_adapted())
        qat = QuantizationAwareTraining(mode="eager", kind="weight_only", scheme=W4, start=start)
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        run = trainer(qat, Distillation(), keep, max_epochs=epochs, enable_checkpointing=True)
        run.fit(module, batches(), ckpt_path=path)
        return module.state_dict()

    through = fit(3)
    for key, value in fit(3, tmp_path / "epoch=1.ckpt").items():
        if isinstance(value, Tensor):
            assert torch.equal(value, through[key]), key
