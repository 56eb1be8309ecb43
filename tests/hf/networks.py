"""Tiny networks of transformers with random weights, their data, and a LightningModule to train them."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

WORDS, LENGTH = 48, 12
_SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def llama(**settings: Any) -> PreTrainedModel:
    """A decoder with one layer and tied embedding and head."""
    settings = {"num_hidden_layers": 1, "num_key_value_heads": 2, "tie_word_embeddings": True} | settings
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, max_position_embeddings=256, **_SIZES, **special, **settings))


def bert() -> PreTrainedModel:
    """An encoder."""
    return BertForSequenceClassification(
        BertConfig(vocab_size=WORDS, num_hidden_layers=1, max_position_embeddings=32, num_labels=3, **_SIZES)
    )


def t5() -> PreTrainedModel:
    """An encoder and a decoder."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=WORDS, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0,
            eos_token_id=None,
        )
    )  # fmt: skip


def vit() -> PreTrainedModel:
    """An image encoder."""
    return ViTForImageClassification(
        ViTConfig(image_size=16, patch_size=8, num_hidden_layers=1, num_labels=3, **_SIZES)
    )


MAKE = {"llama": llama, "bert": bert, "t5": t5, "vit": vit}


def batches(name: str = "llama", count: int = 8, length: int = LENGTH) -> DataLoader[dict[str, Tensor]]:
    """Batches of four as dicts with labels; the next token is learned in a few steps."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        start = torch.randint(3, WORDS, (1,), generator=generator)
        ids = 3 + (start + 5 * torch.arange(length)) % (WORDS - 3)
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        kind = {"labels": ids[0] % 3}
        rows.append(
            {
                "llama": {**text, "labels": ids},
                "bert": text | kind,
                "t5": {**text, "labels": ids[:6]},
                "vit": {"pixel_values": torch.randn(3, 16, 16, generator=generator)} | kind,
            }[name]
        )
    return DataLoader(rows, batch_size=4)  # type: ignore[arg-type]


class Lit(LightningModule):
    """Trains a network that computes its own loss."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network
        self.generated: list[list[int]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.network(**batch).loss

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("loss", self.network(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 5e-3)


def trainer(*callbacks: Any, **settings: Any) -> Trainer:
    """A Trainer on the CPU that writes no files."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
    }
    return Trainer(callbacks=list(callbacks), **quiet | settings)


def generate(network: Any, tokens: int = 100, **settings: Any) -> list[int]:
    """Greedily generated tokens after a prompt."""
    ids = torch.tensor([[5, 10, 15]])
    found = network.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **settings
    )
    return found[0].tolist()  # type: ignore[no-any-return]
