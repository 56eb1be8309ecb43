"""Layers for training: weights are rounded as the kernel will see them, and BatchNorm can be frozen.

A convolution followed by BatchNorm runs as one int8 kernel whose weight is ``weight * gamma / sigma``. Training rounds
that folded weight and divides by ``gamma / sigma`` again, so that BatchNorm itself still sees the convolution's plain
output and learns from the batch (Jacob et al., 2018, section 3.2; as in upstream, folding uses running statistics).
Upstream divides the output, and fails where gamma is 0. Here the smaller weight is divided, and a channel whose factor
is 0 keeps its plain weight: it only affects the output once gamma leaves 0, and must be able to learn that.

Every parameter keeps its float name: fused layers refer to their BatchNorm, which stays where it was.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.nn.qat as nnqat
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat_lightning.layers.batchnorm import factor_of, fake_quantize_folded, folded_parameters
from qat_lightning.layers.synchronized import batch_norm_over_all
from qat_lightning.numerics.fake_quantize import FakeQuantize


class FreezableBatchNorm(_BatchNorm):
    """BatchNorm whose statistics can be frozen by a flag, independent of `train` and `eval`.

    When frozen, it normalizes with the running statistics, as the int8 network will, and does not update them; gamma
    and beta continue to learn.

    Attributes:
        frozen: The flag.
        fixed: Whether it is always frozen, like the module that it replaces.
        counts: Whether it counts batches in training; the module that it replaces may not.
        synchronized: Whether batch statistics are computed over all processes.
    """

    frozen: bool = False
    fixed: bool = False
    counts: bool = True
    synchronized: bool = False

    def forward(self, input: Tensor) -> Tensor:
        """Normalize over the channels of ``input``, shape ``(N, C, ...)``."""
        learns = self.training and not (self.frozen or self.fixed)
        if self.synchronized and (learns or (self.training and self.running_mean is None)):
            return self._over_all(input)
        if self.running_mean is None or (learns and self.counts):
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        mean, variance, momentum = self.running_mean, self.running_var, self.momentum
        return F.batch_norm(
            input, mean, variance, self.weight, self.bias, training=learns, momentum=momentum or 0.0, eps=self.eps
        )

    def _over_all(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        momentum = self.momentum
        if self.num_batches_tracked is not None and self.counts:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        return batch_norm_over_all(
            input, self.running_mean, self.running_var, self.weight, self.bias, momentum or 0.0, self.eps
        )


class FreezableBatchNorm1d(FreezableBatchNorm, nn.BatchNorm1d):
    """`FreezableBatchNorm` for ``(N, C)`` and ``(N, C, L)``."""


class FreezableBatchNorm2d(FreezableBatchNorm, nn.BatchNorm2d):
    """`FreezableBatchNorm` for ``(N, C, H, W)``."""


class FreezableBatchNorm3d(FreezableBatchNorm, nn.BatchNorm3d):
    """`FreezableBatchNorm` for ``(N, C, D, H, W)``."""


class FunctionalBatchNorm(FreezableBatchNorm):
    """``F.batch_norm`` on tensors that the network manages itself; the module only holds the flags."""

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__(0, eps=eps, momentum=momentum, affine=False, track_running_stats=False)

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        count: Tensor | None = None,
    ) -> Tensor:
        """Normalize over dimension 1; without running statistics always with those of the batch."""
        training = running_mean is None or (self.training and not self.frozen)
        momentum = 0.0 if self.momentum is None else self.momentum
        if count is not None and training:
            count.add_(1)
        if self.synchronized and self.training and training:
            return batch_norm_over_all(input, running_mean, running_var, weight, bias, momentum, self.eps)
        return F.batch_norm(
            input, running_mean, running_var, weight, bias, training=training, momentum=momentum, eps=self.eps
        )


_FREEZABLE: dict[type[nn.Module], type[FreezableBatchNorm]] = {
    nn.BatchNorm1d: FreezableBatchNorm1d,
    nn.BatchNorm2d: FreezableBatchNorm2d,
    nn.BatchNorm3d: FreezableBatchNorm3d,
}
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {freezable: plain for plain, freezable in _FREEZABLE.items()}

_WAS_PLAIN = "_plain_without_synchronizing"
"""Marks a BatchNorm that is freezable only while it is synchronized."""


def make_batchnorm_freezable(network: nn.Module) -> None:
    """Give every BatchNorm in ``network`` the flag ``frozen``; parameters, names, hooks and identity stay."""
    for module in network.modules():
        if type(module) in _FREEZABLE:
            module.__class__ = _FREEZABLE[type(module)]


def make_batchnorm_plain(network: nn.Module) -> None:
    """Undo `make_batchnorm_freezable`, for converters that match exact types."""
    for module in network.modules():
        if type(module) in _PLAIN:
            for name in ("frozen", "synchronized", _WAS_PLAIN):
                module.__dict__.pop(name, None)
            module.__class__ = _PLAIN[type(module)]


def synchronize_batchnorm(network: nn.Module, on: bool) -> None:
    """Switch between statistics over all processes and over one process, for every BatchNorm class of torch.

    Modules, parameters, names and hooks stay. Modules that were made freezable for this become plain again.

    Args:
        network: With or without fake-quant.
        on: Whether to use statistics over all processes.
    """
    for module in network.modules():
        if on and type(module) in _FREEZABLE:
            module.__class__ = _FREEZABLE[type(module)]
            module.__dict__[_WAS_PLAIN] = True
        if isinstance(module, FreezableBatchNorm) and on:
            module.synchronized = True
        elif isinstance(module, FreezableBatchNorm):
            module.__dict__.pop("synchronized", None)
            if module.__dict__.pop(_WAS_PLAIN, False):
                module.__class__ = _PLAIN[type(module)]  # type: ignore[assignment]


class FoldedLayer(nn.Module):
    """A convolution or linear layer that rounds its BatchNorm-folded weight and then calls that BatchNorm.

    The BatchNorm is not a child: it stays registered where the float network has it.
    """

    _FLOAT: ClassVar[type[nn.Module]]
    weight: Tensor
    bias: Any
    qconfig: Any

    @property
    def batchnorm(self) -> nn.Module:
        """The BatchNorm after this layer."""
        found: nn.Module = self.__dict__["_batchnorm"]
        return found

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> FoldedLayer:
        """Create it from a fused float module (``nni.ConvBn2d``, …); called by upstream's prepare."""
        layer, batchnorm = mod[0], mod[1]
        relu = mod[2] if len(mod) > 2 else None
        return cls.fuse(layer, batchnorm, relu, qconfig=mod.qconfig)

    @classmethod
    def fuse(cls, layer: Any, batchnorm: nn.Module, relu: nn.Module | None, *, qconfig: Any) -> FoldedLayer:
        """Create the folded layer of ``layer`` and ``batchnorm``, sharing their parameters."""
        folded = cls.__new__(cls)
        # Copy shapes and flags of the float layer, without allocating a second weight.
        folded.__dict__.update(layer.__dict__)
        for name in ("_parameters", "_buffers", "_modules"):
            folded.__dict__[name] = layer.__dict__[name].copy()
        folded.__dict__["_batchnorm"] = batchnorm
        folded.__dict__["_has_relu"] = relu is not None
        folded.qconfig = qconfig
        folded.weight_fake_quant = qconfig.weight()
        return folded

    def folded_weight(self) -> Tensor:
        """The weight as the int8 kernel will see it, divided by BatchNorm's factor."""
        bn: Any = self.batchnorm
        factor = factor_of(bn)
        return fake_quantize_folded(self.weight, factor, self.weight_fake_quant)  # type: ignore[arg-type]

    def to_float(self) -> nn.Module:
        """The float layer with BatchNorm folded in, fused with a ReLU if there is one; called by upstream's convert."""
        bn: Any = self.batchnorm
        layer = self._FLOAT.__new__(self._FLOAT)
        layer.__dict__.update(
            {k: v for k, v in self.__dict__.items() if k not in ("_batchnorm", "_has_relu", "qconfig")}
        )
        for name in ("_parameters", "_buffers", "_modules"):
            layer.__dict__[name] = self.__dict__[name].copy()
        del layer._modules["weight_fake_quant"]
        weight, bias = folded_parameters(self, bn)
        fq: FakeQuantize = self.weight_fake_quant  # type: ignore[assignment]
        layer._parameters["weight"] = nn.Parameter(round_for_good(weight.detach(), fq))
        layer._parameters["bias"] = bias
        layer.__dict__["training"] = False
        if not self.__dict__["_has_relu"]:
            return layer
        return WITH_RELU[self._FLOAT](layer, nn.ReLU())

    def _layer(self, input: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def before_relu(self, input: Tensor) -> Tensor:
        """Output of layer and BatchNorm, before the ReLU."""
        output: Tensor = self.batchnorm(self._layer(input, self.folded_weight()))
        return output

    def forward(self, input: Tensor) -> Tensor:
        """Output of layer, BatchNorm and, if fused, ReLU."""
        output = self.before_relu(input)
        return F.relu(output) if self.__dict__["_has_relu"] else output


WITH_RELU: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nni.ConvReLU1d,
    nn.Conv2d: nni.ConvReLU2d,
    nn.Conv3d: nni.ConvReLU3d,
    nn.Linear: nni.LinearReLU,
}
"""Upstream's classes for a float layer followed by a ReLU."""


class _FoldedConv(FoldedLayer):
    def _layer(self, input: Tensor, weight: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(input, weight, self.bias)  # type: ignore[operator]
        return output


class ConvBn1d(_FoldedConv, nn.Conv1d):
    """`nn.Conv1d` and BatchNorm."""

    _FLOAT = nn.Conv1d


class ConvBn2d(_FoldedConv, nn.Conv2d):
    """`nn.Conv2d` and BatchNorm."""

    _FLOAT = nn.Conv2d


class ConvBn3d(_FoldedConv, nn.Conv3d):
    """`nn.Conv3d` and BatchNorm."""

    _FLOAT = nn.Conv3d


class LinearBn1d(FoldedLayer, nn.Linear):
    """`nn.Linear` and BatchNorm."""

    _FLOAT = nn.Linear

    def _layer(self, input: Tensor, weight: Tensor) -> Tensor:
        return F.linear(input, weight, self.bias)


_WITHOUT_RELU: dict[type[nn.Module], type[nn.Module]] = {
    nniqat.ConvReLU1d: nnqat.Conv1d,
    nniqat.ConvReLU2d: nnqat.Conv2d,
    nniqat.ConvReLU3d: nnqat.Conv3d,
    nniqat.LinearReLU: nnqat.Linear,
}
"""Upstream's layers with rounded weight and ReLU, and the corresponding ones without ReLU."""


def has_relu_inside(layer: nn.Module) -> bool:
    """Whether `before_relu` supports a layer with rounded weight and a ReLU at its end."""
    return type(layer) in _WITHOUT_RELU or (isinstance(layer, FoldedLayer) and bool(layer.__dict__["_has_relu"]))


def before_relu(layer: nn.Module, input: Tensor) -> Tensor:
    """The output of a layer with a fused ReLU, before that ReLU."""
    if isinstance(layer, FoldedLayer):
        return layer.before_relu(input)
    output: Tensor = _WITHOUT_RELU[type(layer)].forward(layer, input)
    return output


FOLDED_OF_FLOAT: dict[type[nn.Module], type[FoldedLayer]] = {
    nn.Conv1d: ConvBn1d,
    nn.Conv2d: ConvBn2d,
    nn.Conv3d: ConvBn3d,
    nn.Linear: LinearBn1d,
}
"""The folded layer of each float layer."""

FOLDED_OF_FUSED: dict[type[nn.Module], type[FoldedLayer]] = {
    nni.ConvBn1d: ConvBn1d,
    nni.ConvBn2d: ConvBn2d,
    nni.ConvBn3d: ConvBn3d,
    nni.ConvBnReLU1d: ConvBn1d,
    nni.ConvBnReLU2d: ConvBn2d,
    nni.ConvBnReLU3d: ConvBn3d,
    nni.LinearBn1d: LinearBn1d,
}
"""The folded layer of each module class that upstream's fusion creates."""


@torch.no_grad()
def round_for_good(weight: Tensor, fq: FakeQuantize) -> Tensor:
    """Round a weight to its grid, and keep that grid from now on.

    Upstream's converters pack a weight with the limits of its storage type, so a weight beyond a narrower grid (with
    fewer bits, or learned) has to be rounded before. The weight of a layer that is left float stays as it is.
    """
    if fq.left_float:
        return weight.float()
    fq.observe(weight)
    fq.hold()
    fq.enable_fake_quant()
    return fq.round(weight.float())


def round_weights_for_good(network: nn.Module) -> None:
    """Round the weights of all layers without BatchNorm; the others are rounded when BatchNorm is folded in."""
    for module in network.modules():
        fq = getattr(module, "weight_fake_quant", None)
        if isinstance(fq, FakeQuantize) and not isinstance(module, FoldedLayer):
            module._parameters["weight"] = nn.Parameter(round_for_good(module.weight, fq))  # type: ignore[arg-type]


class Counter(FreezableBatchNorm):
    """``num_batches_tracked += 1`` in training, unless BatchNorm is frozen."""

    def __init__(self) -> None:
        super().__init__(0, affine=False, track_running_stats=False)

    def forward(self, count: Tensor, by: int) -> Tensor:  # type: ignore[override]
        """Count the batch."""
        return count.add_(by) if self.training and not self.frozen else count
