"""Rehearsals of tiny transformers networks and two detectors: ``python -m benchmarks.zoo.architectures [NAMES]``.

Each is prepared, calibrated, converted, verified, saved and loaded in mode fx; detectors in mode parts. Nothing is
trained or downloaded: weights are random. Needs transformers (and for detectors torchvision and ultralytics) in the
environment that ``python -m benchmarks.zoo --help`` describes; packages that are not installed are reported and
skipped.
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.machine import describe
from benchmarks.zoo.networks import declare_torchvision_ops
from qat_lightning.errors import QuantizationError
from qat_lightning.graph.example import Example
from qat_lightning.rehearsal.rehearse import Rehearsal, rehearse
from qat_lightning.settings.recipe import Recipe

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WORDS = SIZES | {"vocab_size": 100}
NARROW = {name: WORDS[name] for name in WORDS if name != "intermediate_size"}
IMAGES = SIZES | {"image_size": 64, "patch_size": 16}
HEADS = WORDS | {"num_key_value_heads": 2}
PYRAMID = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
PAIR = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
PAIR |= {"vocab_size": 100, "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
SPEECH = SIZES | {"conv_dim": [16] * 7, "num_feat_extract_layers": 7, "num_conv_pos_embeddings": 16}
SPEECH |= {"num_conv_pos_embedding_groups": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

TOKENS = torch.randint(0, 99, (2, 12), generator=torch.Generator().manual_seed(0))
TEXT: dict[str, Any] = {"input_ids": TOKENS}
NO_CACHE = TEXT | {"use_cache": False}
TWO = NO_CACHE | {"decoder_input_ids": TOKENS}
PIXELS: dict[str, Any] = {"pixel_values": torch.randn(2, 3, 64, 64)}
WAVES: dict[str, Any] = {"input_values": torch.randn(2, 4000)}


@dataclass(frozen=True)
class Architecture:
    """A tiny network of the package transformers.

    Attributes:
        network: The class name, without the module.
        config: The class name of its configuration.
        settings: Settings that make it tiny.
        inputs: Inputs of one call, by name.
    """

    network: str
    config: str
    settings: dict[str, Any]
    inputs: dict[str, Any]

    def make(self) -> tuple[nn.Module, Example]:
        """Create the network and its call."""
        transformers = importlib.import_module("transformers")
        settings = {
            name: getattr(transformers, value[0])(**value[1]) if isinstance(value, tuple) else value
            for name, value in self.settings.items()
        }
        return getattr(transformers, self.network)(getattr(transformers, self.config)(**settings)), Example(
            (), self.inputs
        )


def _one(name: str, head: str, settings: dict[str, Any], inputs: dict[str, Any]) -> Architecture:
    return Architecture(f"{name}{head}", f"{name}Config", settings, inputs)


ARCHITECTURES = (
    _one("Albert", "Model", WORDS | {"embedding_size": 16}, TEXT),
    _one("AST", "Model", SIZES | {"max_length": 64, "num_mel_bins": 32}, {"input_values": torch.randn(2, 64, 32)}),
    _one("Bart", "Model", PAIR, TWO),
    _one("Bert", "ForSequenceClassification", WORDS, TEXT | {"labels": torch.tensor([0, 1])}),
    _one("Bloom", "ForCausalLM", {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4}, NO_CACHE),
    _one("CLIP", "Model", {"text_config": WORDS, "vision_config": IMAGES, "projection_dim": 16}, TEXT | PIXELS),
    _one("ConvNext", "Model", PYRAMID, PIXELS),
    _one("DebertaV2", "Model", WORDS | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, TEXT),
    _one("Dinov2", "Model", IMAGES, PIXELS),
    _one("DistilBert", "Model", {"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, TEXT),
    _one(
        "DPT",
        "ForDepthEstimation",
        IMAGES
        | {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 16, 16]}
        | {"fusion_hidden_size": 16, "is_hybrid": False},
        PIXELS,
    ),
    _one("Electra", "Model", WORDS | {"embedding_size": 16}, TEXT),
    _one("Falcon", "ForCausalLM", NARROW, NO_CACHE),
    _one("Gemma2", "ForCausalLM", HEADS | {"head_dim": 8}, NO_CACHE),
    _one("GPT2", "LMHeadModel", {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4}, NO_CACHE),
    _one("Hubert", "Model", SPEECH | {"apply_spec_augment": False}, WAVES),
    _one(
        "Levit",
        "Model",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1]}
        | {"key_dim": [8, 8, 8]},
        PIXELS,
    ),
    _one("Llama", "ForCausalLM", HEADS, NO_CACHE),
    _one("Mamba", "Model", {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, NO_CACHE),
    _one("Mistral", "ForCausalLM", HEADS, NO_CACHE),
    _one("Mixtral", "ForCausalLM", HEADS | {"num_local_experts": 2}, NO_CACHE),
    _one("MobileNetV2", "Model", {"image_size": 64, "depth_multiplier": 0.35}, PIXELS),
    _one(
        "MobileViT",
        "Model",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 32]},
        PIXELS,
    ),
    _one("ModernBert", "Model", WORDS | SPECIAL | {"cls_token_id": 1, "sep_token_id": 2}, TEXT),
    _one("MPNet", "Model", WORDS, TEXT),
    _one(
        "OPT",
        "ForCausalLM",
        {name: WORDS[name] for name in WORDS if name != "intermediate_size"}
        | {"ffn_dim": 64, "word_embed_proj_dim": 32},
        NO_CACHE,
    ),
    _one(
        "PatchTST",
        "ForPrediction",
        {"num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8, "prediction_length": 4}
        | {"d_model": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "ffn_dim": 32},
        {"past_values": torch.randn(2, 32, 2)},
    ),
    _one("Phi", "ForCausalLM", WORDS, NO_CACHE),
    _one("PoolFormer", "Model", PYRAMID, PIXELS),
    _one("Qwen2", "ForCausalLM", HEADS, NO_CACHE),
    _one("Qwen3", "ForCausalLM", HEADS | {"head_dim": 8}, NO_CACHE),
    _one("ResNet", "Model", PYRAMID | {"embedding_size": 8, "layer_type": "basic"}, PIXELS),
    _one("Roberta", "Model", WORDS, TEXT),
    _one("Segformer", "ForSemanticSegmentation", PYRAMID | {"decoder_hidden_size": 16}, PIXELS),
    Architecture("SiglipVisionModel", "SiglipVisionConfig", IMAGES, PIXELS),
    _one(
        "Swin",
        "Model",
        {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        PIXELS,
    ),
    _one(
        "T5", "Model", {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}, TWO
    ),
    _one(
        "UperNet",
        "ForSemanticSegmentation",
        {"backbone_config": ("ConvNextConfig", PYRAMID | STAGES), "hidden_size": 16, "auxiliary_in_channels": 24},
        PIXELS,
    ),
    _one("ViT", "ForImageClassification", IMAGES, PIXELS),
    _one("Wav2Vec2", "Model", SPEECH, WAVES),
    _one(
        "Whisper",
        "Model",
        PAIR | SPECIAL | {"max_source_positions": 50, "decoder_start_token_id": 1},
        {"input_features": torch.randn(2, 80, 100), "decoder_input_ids": TOKENS, "use_cache": False},
    ),
)


def fcos() -> tuple[nn.Module, Example]:
    """Return torchvision's FCOS with a ResNet-50, in evaluation mode, with two images."""
    detection = importlib.import_module("torchvision.models.detection")
    network = detection.fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4, min_size=96, max_size=96)
    return network.eval(), Example(([torch.rand(3, 96, 96), torch.rand(3, 96, 96)],))


def yolo11n() -> tuple[nn.Module, Example]:
    """Return the smallest YOLO11 of ultralytics."""
    tasks = importlib.import_module("ultralytics.nn.tasks")
    return tasks.DetectionModel("yolo11n.yaml", ch=3, nc=80, verbose=False), Example((torch.randn(2, 3, 96, 96),))


DETECTORS: dict[str, Callable[[], tuple[nn.Module, Example]]] = {"fcos": fcos, "yolo11n": yolo11n}
"""Quantized by parts."""


def _row(name: str, mode: str, make: Callable[[], tuple[nn.Module, Example]]) -> tuple[str, ...]:
    torch.manual_seed(0)
    try:
        network, example = make()
    except ImportError as error:
        return name, mode, "", "", f"not installed: {error}"
    began = time.process_time()
    try:
        found = rehearse(network, example, Recipe(mode, "x86"))
    except QuantizationError as error:
        return name, mode, "refused", "", str(error)[:200]
    seconds = f"{time.process_time() - began:.0f}"
    return name, mode, f"{100 * found.int8_macs:.1f} %", seconds, found.unsaved[:200] or _left(found)


def _left(found: Rehearsal) -> str:
    """Return the layers with multiply-accumulates that stay float."""
    rows = [row for row in found.coverage if row.macs and not row.quantized]
    return "; ".join(f"{row.name} ({row.kind}): {row.reason[:80]}" for row in rows[:2])


def main() -> None:
    """Rehearse and print."""
    makers: dict[str, tuple[str, Callable[[], tuple[nn.Module, Example]]]] = {
        one.config.removesuffix("Config"): ("fx", one.make) for one in ARCHITECTURES
    }
    makers |= {name: ("parts", make) for name, make in DETECTORS.items()}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", help=f"by default all of {', '.join(makers)}")
    names = parser.parse_args().names or list(makers)
    declare_torchvision_ops()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    table = Table("network", "mode", "MACs in int8", "rehearsal, s", "what stays float, or why it is refused")
    for name in names:
        table.add_row(*_row(name, *makers[name]))
    Console(width=160).print(table)
    print(describe())


if __name__ == "__main__":
    main()
