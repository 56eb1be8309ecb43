"""Quantization-aware training with other tools: how each prepares a network and converts a trained one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Peer:
    """One tool, with its presets for int8 on this CPU.

    Attributes:
        prepare: Takes the float network, batches of images, and whether weights are per-tensor; returns the network to
            train. Ranges that a tool does not observe during training are calibrated on the batches.
        convert: Takes the trained network and one batch of images; returns the network to evaluate.
        result: Description of that network.
        batchnorm: What the tool does with BatchNorm in training.
        install: How to install it.
    """

    prepare: Callable[[nn.Module, Sequence[Tensor], bool], nn.Module]
    convert: Callable[[nn.Module, Tensor], nn.Module]
    result: str
    batchnorm: str
    install: str = ""


def _prepare_fx(network: nn.Module, batches: Sequence[Tensor], per_tensor: bool) -> Any:
    from torch.ao.quantization import QConfig, default_fused_wt_fake_quant, get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    mapping = get_default_qat_qconfig_mapping("x86")
    if per_tensor:
        mapping.set_global(QConfig(mapping.global_qconfig.activation, default_fused_wt_fake_quant))
    return prepare_qat_fx(network.train(), mapping, (batches[0],))


def _convert_fx(network: nn.Module, images: Tensor) -> Any:
    from torch.ao.quantization.quantize_fx import convert_fx

    return convert_fx(network.eval())


def _prepare_torchao(network: nn.Module, batches: Sequence[Tensor], per_tensor: bool) -> Any:
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    config = x86.get_default_x86_inductor_quantization_config(is_qat=True)
    if per_tensor:
        config = replace(config, weight=_per_tensor(config.weight))
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(config)
    sizes = ({0: torch.export.Dim.AUTO},)
    exported = torch.export.export(network.train(), (batches[0],), dynamic_shapes=sizes, strict=True)
    return prepare_qat_pt2e(exported.module(), quantizer)


def _per_tensor(spec: Any) -> Any:
    from torchao.quantization.pt2e import FusedMovingAvgObsFakeQuantize, MovingAverageMinMaxObserver

    fake_quantize = FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAverageMinMaxObserver, eps=2**-12)
    return replace(spec, qscheme=torch.per_tensor_symmetric, ch_axis=None, observer_or_fake_quant_ctr=fake_quantize)


def _convert_torchao(network: nn.Module, images: Tensor) -> Any:
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    return move_exported_model_to_eval(convert_pt2e(network))


def _prepare_modelopt(network: nn.Module, batches: Sequence[Tensor], per_tensor: bool) -> Any:
    import modelopt.torch.quantization as mtq

    config: dict[str, Any] = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    if per_tensor:
        weights = {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": None}}
        disabled = next(index for index, entry in enumerate(config["quant_cfg"]) if _turns_off_one(entry))
        config["quant_cfg"].insert(disabled, weights)

    def calibrate(quantized: Any) -> None:
        for images in batches:
            quantized(images)

    return mtq.quantize(network, config, calibrate).train()


def _turns_off_one(entry: Any) -> bool:
    return entry.get("enable") is False and entry["quantizer_name"] != "*"


def _convert_modelopt(network: nn.Module, images: Tensor) -> Any:
    return network.eval()


def _prepare_nncf(network: nn.Module, batches: Sequence[Tensor], per_tensor: bool) -> Any:
    import nncf
    import nncf.torch
    from nncf.quantization.advanced_parameters import QuantizationParameters

    advanced = nncf.AdvancedQuantizationParameters(
        weights_quantization_params=QuantizationParameters(per_channel=False if per_tensor else None)
    )
    data = nncf.Dataset(batches)
    quantized = nncf.quantize(network.eval(), data, subset_size=len(batches), advanced_parameters=advanced)
    return quantized.train()


def _convert_nncf(network: nn.Module, images: Tensor) -> Any:
    import nncf
    import openvino

    stripped = nncf.strip(network.eval(), example_input=images)
    converted = openvino.convert_model(stripped, example_input=images, input=[-1, *images.shape[1:]])
    return OpenVINONetwork(converted)


class OpenVINONetwork(nn.Module):
    """An OpenVINO model on this CPU with torch's number of threads; maps tensors to scores.

    Args:
        model: The model.
    """

    def __init__(self, model: Any) -> None:
        import openvino

        super().__init__()
        self.compiled = openvino.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads()})

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores of a batch of images."""
        return torch.from_numpy(self.compiled(images.numpy())[0])


PEERS = {
    "torch FX": Peer(_prepare_fx, _convert_fx, "int8", "trains, folded into the weights that are rounded"),
    "torchao PT2E": Peer(
        _prepare_torchao,
        _convert_torchao,
        "int8 weights, uncompiled graph",
        "trains, folded into the weights that are rounded",
    ),
    "ModelOpt": Peer(
        _prepare_modelopt,
        _convert_modelopt,
        "fake-quantized",
        "trains behind the rounded convolution",
        "pip install nvidia-modelopt",
    ),
    "NNCF": Peer(
        _prepare_nncf,
        _convert_nncf,
        "int8, OpenVINO",
        "trains behind the rounded convolution",
        "pip install nncf openvino",
    ),
}
"""The tools by name."""
