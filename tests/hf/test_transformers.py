"""Unmodified networks of transformers in a LightningModule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from qat_lightning import PostTrainingQuantization, QuantizationAwareTraining, load_quantized
from qat_lightning.errors import NetworkError, TraceError
from tests.hf.networks import MAKE, Lit, batches, generate, llama, trainer
from tests.support.nightly import nightly_except


def _trained(module: Lit, name: str = "llama", **settings: Any) -> QuantizationAwareTraining:
    callback = QuantizationAwareTraining(**{"mode": "eager", "kind": "weight_only", **settings})
    run = trainer(callback)
    run.fit(module, batches(name))
    run.test(module, batches(name), verbose=False)
    return callback


def _floats(callback: QuantizationAwareTraining | PostTrainingQuantization) -> dict[str, str]:
    return {row.name: row.reason for row in callback.quantized.coverage if not row.quantized}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "weight_only"),
        ("bert", "dynamic"),
        pytest.param("t5", "dynamic", marks=pytest.mark.slow),
        ("vit", "weight_only"),
        *(pytest.param(name, "static", marks=pytest.mark.slow) for name in ("llama", "bert", "t5", "vit")),
    ],
)
def test_eager_trains_and_converts_every_layer_that_has_a_kernel(name: str, kind: str) -> None:
    callback = _trained(Lit(MAKE[name]()), name, kind=kind)
    assert callback.fidelity["sqnr_db"] > (100 if kind != "static" else 45)
    assert _floats(callback) == {}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "vit")])
@pytest.mark.parametrize("kind", ["static", "dynamic", "weight_only"])
def test_fx_takes_encoders(name: str, kind: str) -> None:
    assert _trained(Lit(MAKE[name]()), name, mode="fx", kind=kind).fidelity["agreement"] == 1.0


@pytest.mark.parametrize("kind", ["dynamic", "weight_only", pytest.param("static", marks=pytest.mark.slow)])
def test_generate_gives_the_tokens_of_fake_quant_in_int8_and_after_loading(kind: str, tmp_path: Path) -> None:
    varied = {"tie_word_embeddings": False, "initializer_range": 0.3}
    module = Lit(llama(**varied))
    callback = _trained(module, kind=kind)
    module.eval()
    expected = generate(module.network)
    assert len(set(expected)) > 5
    assert generate(callback.quantized) == expected
    if kind == "weight_only":  # the range of a dynamic layer is that of all tokens of a call
        assert generate(callback.quantized, use_cache=False) == expected
    callback.save(tmp_path / "llama.int8")
    loaded = load_quantized(tmp_path / "llama.int8", network=llama(**varied))
    assert generate(loaded) == expected
    assert loaded.config.vocab_size == module.network.config.vocab_size


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "dynamic", "weight_only"])
def test_an_encoder_and_decoder_generates_the_same_in_int8(kind: str) -> None:
    module = Lit(MAKE["t5"]())
    callback = _trained(module, "t5", kind=kind)
    assert generate(module.eval().network) == generate(callback.quantized)


def test_post_training_quantization_generates() -> None:
    module, callback = Lit(llama()), PostTrainingQuantization(kind="weight_only", mode="eager")
    trainer(callback).test(module, batches(), verbose=False)
    assert not _floats(callback)
    assert len(generate(callback.quantized, 4)) == 7


class _Generates(Lit):
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        self.generated.append(generate(self.network, 8))


def test_a_test_that_calls_a_method_of_the_network_runs_int8() -> None:
    module = _Generates(llama())
    callback = _trained(module, kind="dynamic")
    called: list[Tensor] = []
    layer = callback.quantized.network.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda *call: called.append(call[1]))
    trainer(callback).test(module, batches(count=4), verbose=False)
    assert len(called) == 1 + 8
    assert module.generated[-1] == generate(callback.quantized, 8)


def test_a_graph_says_which_mode_keeps_methods() -> None:
    module, callback = Lit(llama(use_cache=False)), PostTrainingQuantization(kind="weight_only", mode="fx")
    trainer(callback).test(module, batches(), verbose=False)
    with pytest.raises(AttributeError, match="mode='eager' keeps your methods"):
        callback.quantized.generate(torch.tensor([[5]]))
    assert not hasattr(callback.quantized, "generate")


def test_gradient_checkpointing_keeps_every_layer_and_its_gradients() -> None:
    def trained(checkpointing: bool) -> tuple[Lit, QuantizationAwareTraining]:
        torch.manual_seed(0)
        module = Lit(llama(use_cache=False))
        if checkpointing:
            module.network.gradient_checkpointing_enable()
            assert module.network.model.embed_tokens._forward_hooks
        return module, _trained(module)

    (plain, _), (module, callback) = trained(False), trained(True)
    assert module.network.is_gradient_checkpointing
    assert not _floats(callback)
    assert callback.fidelity["sqnr_db"] == float("inf")
    for one, other in zip(plain.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "dynamic", "weight_only"])
def test_compiled_steps_in_bf16_go_with_checkpointing(kind: str) -> None:
    module = Lit(llama(use_cache=False))
    module.network.gradient_checkpointing_enable()
    callback = QuantizationAwareTraining(mode="eager", kind=kind, compile=True)  # type: ignore[arg-type]
    trainer(callback, precision="bf16-mixed", max_epochs=3).fit(module, batches())
    assert generate(module.eval().network, 16) == generate(callback.quantized, 16)


def test_a_cache_in_a_graph_is_refused_before_the_first_step() -> None:
    callback = QuantizationAwareTraining(mode="fx", kind="weight_only")
    module = Lit(llama())
    with pytest.raises((TraceError, NetworkError), match="use_cache"):
        trainer(callback).fit(module, batches())
    assert not module.trainer.global_step


def test_the_trained_network_is_saved_as_any_other(tmp_path: Path) -> None:
    module = Lit(llama())
    _trained(module)
    module.network.save_pretrained(tmp_path)
    loaded = type(module.network).from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, module.network.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", nightly_except(["dynamic", "weight_only"], "dynamic"))
def test_a_graph_takes_other_lengths_until_it_is_saved(kind: str, tmp_path: Path) -> None:
    callback = _trained(Lit(MAKE["bert"]()), "bert", mode="fx", kind=kind)
    shorter = next(iter(batches("bert", length=7)))
    expected = callback.prepared.eval()(**shorter).logits
    torch.testing.assert_close(callback.quantized(**shorter).logits, expected, rtol=1e-3, atol=1e-3)
    callback.save(tmp_path / "bert.int8")
    with pytest.raises(NetworkError, match="example_inputs="):
        load_quantized(tmp_path / "bert.int8", trusted=True)(**shorter)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("vit", "fx"),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in (("bert", "fx"), ("llama", "fx"), ("bert", "pt2e"))),
        *(pytest.param(*row, marks=pytest.mark.nightly) for row in (("vit", "pt2e"), ("llama", "pt2e"))),
    ],
)
def test_a_graph_that_is_trained_with_labels_predicts_without(name: str, mode: str, tmp_path: Path) -> None:
    settings = {"use_cache": False} if name == "llama" else {}
    module = Lit(MAKE[name](**settings))
    callback = _trained(module, name, mode=mode, kind="static")
    batch = dict(next(iter(batches(name))))
    whole = callback.quantized(**batch)
    del batch["labels"]
    callback.save(tmp_path / "net.int8")
    for network in (callback.quantized, load_quantized(tmp_path / "net.int8")):
        found = network(**batch)
        assert type(found) is type(whole)
        assert found.loss is None
        assert torch.equal(found.logits, whole.logits)
