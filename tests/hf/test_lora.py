"""Low-rank adapters of peft: merged into the rounded weight, or float beside it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from lightning.pytorch.callbacks import ModelCheckpoint
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from qat_lightning import PostTrainingQuantization, QuantizationAwareTraining, Scheme, load_quantized
from qat_lightning.errors import ConfigurationError, NetworkError
from tests.hf.networks import Lit, batches, generate, llama, trainer

W4 = Scheme(weight_bits=4, weight_granularity="per_group", weight_group_size=16, activation_granularity="per_token")
W4_FAST = Scheme(weight_bits=4, weight_granularity="per_group", weight_group_size=16, weight_observer="min_max")
VARIED = {"tie_word_embeddings": False, "initializer_range": 0.3}
QUERY = "model.layers.0.self_attn.q_proj"


def _adapted(**settings: Any) -> Any:
    given = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    torch.manual_seed(0)
    return get_peft_model(llama(**VARIED), LoraConfig(**given | settings))


def _qat(**settings: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(**{"mode": "eager", "kind": "weight_only", "scheme": W4_FAST, **settings})


def _trained(network: Any, **settings: Any) -> tuple[Lit, QuantizationAwareTraining]:
    module, callback = Lit(network), _qat(**settings)
    run = trainer(callback)
    run.fit(module, batches())
    run.test(module, batches(), verbose=False)
    module.eval()
    return module, callback


@pytest.mark.parametrize(
    ("kind", "scheme", "adapter"),
    [
        ("weight_only", W4, {}),
        ("dynamic", Scheme(), {}),
        pytest.param("dynamic", W4, {}, marks=pytest.mark.slow),
        pytest.param("weight_only", W4, {"lora_dropout": 0.3}, marks=pytest.mark.slow),
        pytest.param("weight_only", W4, {"use_dora": True}, marks=pytest.mark.slow),
        pytest.param("weight_only", W4, {"use_rslora": True, "bias": "all"}, marks=pytest.mark.slow),
        pytest.param("weight_only", W4, {"target_modules": ["embed_tokens", "q_proj"]}, marks=pytest.mark.slow),
        ("weight_only", W4, {"modules_to_save": ["lm_head"]}),
    ],
)
def test_the_merged_weight_is_what_trains_and_what_is_stored(
    kind: str, scheme: Scheme, adapter: dict[str, Any], tmp_path: Path
) -> None:
    network = _adapted(**adapter)
    query = network.base_model.model.get_submodule(QUERY)
    before, down = query.base_layer.weight.clone(), query.lora_A["default"].weight.clone()
    _, callback = _trained(network, kind=kind, scheme=scheme)
    assert torch.equal(query.base_layer.weight, before)
    assert not torch.equal(query.lora_A["default"].weight, down)
    assert callback.fidelity["sqnr_db"] > (100 if kind == "dynamic" else 1e9)
    expected = generate(network, 24)
    assert generate(callback.quantized, 24) == expected
    assert not any("lora" in key or "modules_to_save" in key for key in callback.quantized.state_dict())
    assert all(row.quantized or "no dynamic kernel" in row.reason for row in callback.quantized.coverage)
    assert f"base_model.model.{QUERY}" in {row.name for row in callback.quantized.coverage}
    callback.save(tmp_path / "lora.int8")
    for given in (llama(**VARIED), _adapted(**adapter)):
        assert generate(load_quantized(tmp_path / "lora.int8", network=given), 24) == expected


def test_what_is_stored_is_what_peft_merges(tmp_path: Path) -> None:
    module, callback = _trained(_adapted(), scheme=Scheme())
    module.network.save_pretrained(tmp_path)
    torch.manual_seed(0)
    merged = PeftModel.from_pretrained(llama(**VARIED), tmp_path).merge_and_unload()
    stored = callback.quantized.get_submodule(f"network.{QUERY}").weight
    wanted = merged.get_submodule(QUERY).weight
    step = wanted.abs().amax(1, keepdim=True) / 127
    assert bool(((stored - wanted).abs() <= 0.501 * step).all())
    assert isinstance(module.network, PeftModel)  # which trains on
    assert copy.deepcopy(module.network).merge_and_unload().get_submodule(QUERY).weight.allclose(wanted, atol=1e-6)


def test_float_adapters_stay_beside_the_rounded_weight(tmp_path: Path) -> None:
    module, callback = _trained(_adapted(), adapters="float")
    assert callback.fidelity["sqnr_db"] == float("inf")
    floats = {row.name for row in callback.quantized.coverage if not row.quantized}
    assert floats
    assert all("lora_" in name for name in floats)
    callback.save(tmp_path / "lora.int8")
    loaded = load_quantized(tmp_path / "lora.int8", network=_adapted())
    assert generate(loaded, 24) == generate(callback.quantized, 24) == generate(module.network, 24)


def test_two_adapters_are_merged_as_they_are_active() -> None:
    network = _adapted()
    other = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    network.add_adapter("other", other)
    network.base_model.set_adapter(["default", "other"])
    _, callback = _trained(network)
    assert callback.fidelity["sqnr_db"] == float("inf")
    both = generate(callback.quantized, 8)
    network.base_model.set_adapter(["other"])
    callback.convert()
    assert generate(callback.quantized, 8) == generate(network, 8) != both


def test_a_resumed_training_is_bit_equal_and_its_checkpoint_holds_the_base_once(tmp_path: Path) -> None:
    def fit(epochs: int, path: Path | None = None) -> Lit:
        module = Lit(_adapted())
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        run = trainer(_qat(start={"epoch": 1}), keep, max_epochs=epochs, enable_checkpointing=True)
        run.fit(module, batches(), ckpt_path=path)
        return module

    through = fit(3)
    for key, value in fit(3, tmp_path / "epoch=1.ckpt").state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, through.state_dict()[key]), key
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    (callback,) = (state for name, state in saved["callbacks"].items() if "Quantization" in name)
    kept = callback["float_weights"]["network"]
    assert kept
    assert not any("base_layer" in key or "embed_tokens" in key for key in kept)


def test_the_float_variant_has_the_adapters_of_before() -> None:
    plain, module = Lit(_adapted()), Lit(_adapted())
    short = trainer(max_epochs=1)
    short.fit(plain, batches())
    expected = short.test(plain, batches(), verbose=False)
    callback = _qat(start={"epoch": 1})
    run = trainer(callback)
    run.fit(module, batches())
    callback.use_variant("float")
    assert run.test(module, batches(), verbose=False) == expected
    module.network.base_model.model.get_submodule(QUERY).base_layer.weight.requires_grad_(True)
    with pytest.raises(ConfigurationError, match="was frozen when fake-quantization was enabled"):
        run.test(module, batches(), verbose=False)


@pytest.mark.parametrize(
    ("adapter", "settings", "says"),
    [
        ({}, {"kind": "static", "scheme": Scheme()}, "merge_and_unload"),
        ({"use_dora": True, "lora_dropout": 0.1}, {}, "use lora_dropout=0"),
        ({"use_dora": True}, {"adapters": "float"}, "adapters='merged'"),
        ({"lora_bias": True}, {}, "use lora_bias=False"),
        ({"trainable_token_indices": [1, 2]}, {}, "adapters='float'"),
    ],
)
def test_what_does_not_go_is_refused_before_the_first_step(
    adapter: dict[str, Any], settings: dict[str, Any], says: str
) -> None:
    module = Lit(_adapted(**adapter))
    with pytest.raises(NetworkError, match=says):
        trainer(_qat(**settings)).fit(module, batches())
    assert not module.trainer.global_step


def test_other_adapters_and_merged_ones_are_refused() -> None:
    merged = _adapted()
    merged.merge_adapter()
    with pytest.raises(NetworkError, match="unmerge_adapter"):
        trainer(_qat()).fit(Lit(merged), batches())
    other = get_peft_model(llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(NetworkError, match="is not a LoRA layer"):
        trainer(_qat()).fit(Lit(other), batches())
    with pytest.raises(ConfigurationError, match="merged, float"):
        _qat(adapters="both")


def test_post_training_quantization_merges() -> None:
    module, callback = Lit(_adapted()), PostTrainingQuantization(kind="weight_only", mode="eager")
    trainer(callback).test(module, batches(), verbose=False)
    assert not any("lora" in key for key in callback.quantized.state_dict())
    assert isinstance(module.network, PeftModel)


def test_a_graph_holds_no_adapter_and_excluded_layers_are_named_as_they_train() -> None:
    torch.manual_seed(0)
    network = get_peft_model(llama(use_cache=False), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    _, callback = _trained(network, mode="fx", exclude=["network.base_model.model.lm_head"])
    assert callback.fidelity["sqnr_db"] > 60
    assert [row.name for row in callback.quantized.coverage if row.excluded] == ["base_model.model.lm_head"]


def test_a_prepared_network_pickles() -> None:
    module, _ = _trained(_adapted())
    layer = module.network.base_model.model.get_submodule(QUERY)
    again = pickle.loads(pickle.dumps(layer))
    x = torch.randn(2, 32)
    assert torch.equal(again(x), layer(x))


@pytest.mark.slow
def test_compiled_steps_under_checkpointing() -> None:
    network = _adapted(lora_dropout=0.0)
    network.gradient_checkpointing_enable()
    _, callback = _trained(network, compile=True, kind="dynamic")
    assert callback.fidelity["sqnr_db"] > 60
