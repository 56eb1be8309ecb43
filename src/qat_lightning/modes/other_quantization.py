"""Networks that were modified by PyTorch's own quantization: which modules may stay, and which are refused."""

from __future__ import annotations

import sys

import torch.ao.nn.intrinsic as nni
from torch import nn
from torch.ao.nn.quantized import FloatFunctional, FXFloatFunctional
from torch.ao.quantization import FakeQuantizeBase, ObserverBase

from qat_lightning.errors import NetworkError
from qat_lightning.modes.prepared import is_prepared
from qat_lightning.numerics.fake_quantize import FakeQuantize

_ELSEWHERE = (
    "torch.ao.nn.qat",
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.qat",
    "torch.ao.nn.intrinsic.quantized",
)
_FLOAT = (FloatFunctional, FXFloatFunctional)


def is_fused_float(module: nn.Module) -> bool:
    """Whether a module is a float module created by ``fuse_modules``."""
    return isinstance(module, nni.modules.fused._FusedModule) and not type(module).__module__.startswith(_ELSEWHERE)


def refuse_other_quantization(network: nn.Module) -> None:
    """Raise an error for a network with fake-quant, observers or int8 layers of another library.

    ``QuantStub``, ``DeQuantStub``, ``FloatFunctional`` and fused modules of ``fuse_modules`` compute in float, and may
    stay.

    Args:
        network: The network that is about to be prepared.

    Raises:
        NetworkError: There are such modules, and the message names them; or it is prepared already, by this library.
    """
    if any(map(is_prepared, network.modules())):
        raise NetworkError(
            f"{type(network).__name__} is prepared for quantization already, perhaps in another mode. What to do: "
            "prepare a copy of the float network, copy.deepcopy(network), for each mode."
        )
    found = {}
    for name, module in network.named_modules():
        observes = isinstance(module, (ObserverBase, FakeQuantizeBase, *_of_torchao()))
        foreign = type(module).__module__.startswith(_ELSEWHERE) and not isinstance(module, _FLOAT)
        if (observes and not isinstance(module, FakeQuantize)) or foreign:
            found[name or "itself"] = type(module).__name__
    if found:
        named = ", ".join(f"{name!r} ({kind})" for name, kind in list(found.items())[:3])
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise NetworkError(
            f"{type(network).__name__} was prepared or converted by torch.ao.quantization: it holds {named}{more}, "
            "where a float network is expected. What to do: give the network as it was before prepare(), prepare_qat() "
            "or convert(); QuantStub, DeQuantStub, FloatFunctional and fuse_modules() may stay in it."
        )


def _of_torchao() -> tuple[type, ...]:
    """Torchao's own fake-quantize; empty if torchao was never imported, since no network can contain one then."""
    module = sys.modules.get("torchao.quantization.pt2e.fake_quantize")
    return () if module is None else (module.FakeQuantizeBase,)


def forget_qconfigs(network: nn.Module) -> None:
    """Remove the settings of PyTorch's own quantization from the modules, which would interfere with ours."""
    for module in network.modules():
        module.__dict__.pop("qconfig", None)
