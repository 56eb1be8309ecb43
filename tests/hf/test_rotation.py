"""Rotated networks of transformers compute the same outputs."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import GPT2Config, GPT2LMHeadModel

from qat_lightning.graph.example import Example
from qat_lightning.recipes.rotation import rotate
from tests.hf.networks import LENGTH, WORDS, bert, llama, t5, vit

IDS = torch.arange(2 * LENGTH).reshape(2, LENGTH) % WORDS


def gpt2() -> Any:
    """Linear layers with transposed weights, and a head without a bias after a LayerNorm."""
    special = {"bos_token_id": 0, "eos_token_id": 0}
    sizes = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}
    return GPT2LMHeadModel(GPT2Config(**sizes, **special, tie_word_embeddings=False))


NETWORKS: dict[str, tuple[Any, dict[str, Any], dict[int, int]]] = {
    # network, inputs, how many layers read how many channels that are rotated together
    "llama": (lambda: llama(tie_word_embeddings=False, num_hidden_layers=2), {"input_ids": IDS}, {32: 11, 8: 2}),
    "llama, tied": (lambda: llama(num_hidden_layers=2), {"input_ids": IDS}, {8: 2}),
    "gpt2": (gpt2, {"input_ids": IDS}, {32: 5, 8: 2}),
    "bert": (bert, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, {8: 1}),
    "vit": (vit, {"pixel_values": torch.randn(2, 3, 16, 16)}, {32: 5, 8: 1}),
    "t5": (t5, {"input_ids": IDS, "decoder_input_ids": IDS}, {8: 3}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_computes_the_same(name: str) -> None:
    make, inputs, sizes = NETWORKS[name]
    torch.manual_seed(0)
    network = make().eval()
    network.config.use_cache = False
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    before = copy.deepcopy(network)
    done = rotate(network, Example((), inputs))
    assert Counter(done.rotated.values()) == sizes, done
    others = {key: value.flip(0) for key, value in inputs.items()}
    with torch.no_grad():
        torch.testing.assert_close(network(**others).logits, before(**others).logits, rtol=1e-4, atol=1e-5)


def test_a_network_with_its_norms_behind_the_additions_says_what_stays() -> None:
    network = bert().eval()
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    done = rotate(network, Example((), {"input_ids": IDS}))
    assert list(done.rotated) == ["bert.encoder.layer.0.attention.output.dense"]
    assert len(done.left) == 7
    assert "rotated (1 of 8 channels each); 7 cannot be: " in str(done)
