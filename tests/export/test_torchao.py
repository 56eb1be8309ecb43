"""Integer networks as torchao's tensors, and as safetensors that torchao and transformers load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import CombinationError, ExportError
from qat_lightning.export.torchao import FILE, save_torchao, to_torchao, torchao_config
from qat_lightning.graph.example import Example
from qat_lightning.modes.uncalibrated import quantize
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme

GROUPS: Any = {"weight_bits": 4, "weight_granularity": "per_group", "weight_group_size": 32}
TOKENS: Any = {"activation_granularity": "per_token"}
SCHEMES: dict[str, tuple[Any, Any]] = {
    "8 bits": ("weight_only", {}),
    "8 bits, affine": ("weight_only", {"weight_symmetric": False}),
    "4 bits in groups": ("weight_only", GROUPS),
    "8da8w": ("dynamic", TOKENS),
    "8da4w": ("dynamic", TOKENS | GROUPS),
}


def made(network: nn.Module, example: Example, scheme: str, mode: str = "eager") -> QuantizedNetwork:
    kind, values = SCHEMES[scheme]
    recipe = Recipe(mode, "x86", Scheme(**values), kind=kind)
    return QuantizedNetwork(quantize(network.eval(), example, recipe), recipe, example)


class Words(nn.Module):
    """An embedding, a linear layer, an LSTM, and a parameter without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.shift = nn.Embedding(20, 32), nn.Parameter(torch.randn(32))
        self.up, self.lstm, self.head = (
            nn.Linear(32, 64),
            nn.LSTM(64, 16, batch_first=True),
            nn.Linear(64, 5, bias=False),
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.up(self.table(ids) + self.shift))
        y: torch.Tensor = self.head(x).mean(1) + self.lstm(x)[0][:, -1, :5]
        return y


WORDS = Example((torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(0)),))


@pytest.mark.parametrize("mode", ["eager", "fx"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_torchao_computes_with_the_networks_own_integers(scheme: str, mode: str) -> None:
    quantized = made(Words(), WORDS, scheme, mode)
    network, ids = to_torchao(quantized), torch.randint(0, 20, (3, 6))
    names = {type(p.data).__name__ for p in network.parameters()}
    assert "IntxUnpackedToInt8Tensor" in names
    least = 140 if quantized.recipe.kind == "weight_only" else 100  # float kernels may add in another order
    assert sqnr_db(quantized(ids), network(ids)) >= least


@pytest.mark.parametrize("scheme", ["8 bits, affine", "8da4w"])
def test_safetensors_load_into_the_float_network(scheme: str, tmp_path: Path) -> None:
    """With the code in the docs, which does not use this package."""
    safetensors = pytest.importorskip("safetensors")
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    quantized, network = made(Words(), WORDS, scheme), Words().eval()
    folder = save_torchao(quantized, tmp_path / "words")
    with safetensors.safe_open(folder / FILE, "pt") as file:
        entries, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    state, _ = unflatten_tensor_state_dict(entries, metadata)
    nn.ModuleDict({"network": network}).load_state_dict(state, assign=True)
    ids = torch.randint(0, 20, (3, 6))
    assert sqnr_db(quantized(ids), network(ids)) > 100


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", ["8 bits", "4 bits in groups", "8da4w"])
def test_transformers_load_the_folder(scheme: str, tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied)
    example = Example((), {"input_ids": torch.randint(0, 64, (2, 8)), "use_cache": False})
    quantized = made(transformers.LlamaForCausalLM(config), example, scheme)
    folder = save_torchao(quantized, tmp_path / "llama")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded.lm_head.weight.data).__name__ == "IntxUnpackedToInt8Tensor"
    ids = torch.randint(0, 64, (3, 5))
    assert sqnr_db(quantized(input_ids=ids, use_cache=False).logits, loaded(ids).logits) > 100
    assert loaded.generate(ids, max_new_tokens=2).shape[1] == 7


@pytest.mark.parametrize(
    ("recipe", "instead"),
    [
        (Recipe("eager", "x86", kind="dynamic"), "activation_granularity='per_token'"),
        (Recipe("eager", "x86", kind="static"), "kind='dynamic'"),
        (Recipe("pt2e", "x86", kind="weight_only"), "mode='eager'"),
        (
            Recipe("fx", "x86", Scheme(activation_symmetric=True, **TOKENS), kind="dynamic"),
            "activation_symmetric=False",
        ),
    ],
)
def test_grids_that_torchao_has_not_are_refused_with_what_to_use(recipe: Recipe, instead: str) -> None:
    with pytest.raises(CombinationError, match=instead):
        torchao_config(recipe)


def test_groups_that_do_not_divide_a_row_are_refused() -> None:
    network, example = nn.Sequential(nn.Linear(40, 3)), Example((torch.randn(4, 40),))
    with pytest.raises(ExportError, match="'0' has rows of 40 weights"):
        to_torchao(made(network, example, "4 bits in groups"))
