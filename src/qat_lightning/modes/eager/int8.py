"""Layers of an int8 network in eager mode, and the tensors that they exchange.

The user's own ``forward`` runs. To it, the output of an int8 layer is a float tensor: any function that touches it gets
dequantized values, while another int8 layer takes the integers inside. The output of a chain's kernel already includes
the BatchNorm and activation after the layer, so until these were called it may only be passed to them: any other use
raises an error, because the float network would compute something else there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.errors import NetworkError
from qat_lightning.layers.subpixel import Subpixel
from qat_lightning.modes.eager.calls import CountsCalls
from qat_lightning.modes.eager.chains import Chain
from qat_lightning.modes.eager.observation import function_name

_ESCAPES = frozenset({"data", "numpy", "__array__", "data_ptr", "untyped_storage", "storage", "__dlpack__"})
"""Accesses to a tensor's memory that can change it without a new version."""


class Int8Tensor(Tensor):
    """Behaves like a float tensor, and holds the integers that an int8 layer computed.

    Args:
        quantized: The integers and their grid.
        layer: Name of the layer that computed it.
        pending: Names of the modules that the kernel has already computed and that the forward has yet to call.
        direct: Whether it is the output of a layer, and not of a function applied to one.
        memory_format: Memory format of the float tensor that it behaves like.
    """

    quantized: Tensor
    layer: str
    pending: tuple[str, ...]
    direct: bool
    _memory_format: torch.memory_format
    _float: Tensor | None
    _float_version: int
    _escaped: bool

    @staticmethod
    def __new__(
        cls,
        quantized: Tensor,
        layer: str,
        pending: tuple[str, ...] = (),
        direct: bool = True,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Int8Tensor:
        """Wrap ``quantized``."""
        strides = _strides(quantized, memory_format)
        self: Int8Tensor = Tensor._make_wrapper_subclass(cls, quantized.shape, strides=strides, dtype=torch.float32)
        self.quantized, self.layer, self.pending, self.direct = quantized, layer, pending, direct
        self._memory_format = memory_format
        self._float, self._float_version, self._escaped = None, 0, False
        return self

    def integers(self) -> Tensor | None:
        """The quantized tensor, or None if an in-place operation has changed the float one since."""
        self._refuse_if_pending("another layer")
        if self._float is None:
            return self.quantized
        if self._float._version != self._float_version:
            return None
        if not self._escaped:
            return self.quantized
        grid = self.quantized
        return torch.quantize_per_tensor(self._float, grid.q_scale(), grid.q_zero_point(), grid.dtype)

    def floating(self, user: str = "the caller") -> Tensor:
        """The float tensor: the same object each time, so that views and in-place operations work."""
        self._refuse_if_pending(user)
        if self._float is None:
            # Outside inference mode, whose tensors have no version counter.
            with torch.inference_mode(False), torch.no_grad():
                self._float = self.quantized.dequantize().contiguous(memory_format=self._memory_format)
                self._float_version = self._float._version
        return self._float

    def passed(self, inplace: bool) -> Int8Tensor:
        """The tensor after the first pending module."""
        if inplace:
            self.pending = self.pending[1:]
            return self
        return Int8Tensor(self.quantized, self.layer, self.pending[1:], self.direct, self._memory_format)

    def _refuse_if_pending(self, user: str) -> None:
        if self.pending:
            links = " and ".join(repr(name) for name in self.pending)
            raise NetworkError(
                f"The int8 layer {self.layer!r} has computed {links} as well, because they followed it when the "
                f"network was prepared; this time its output goes to {user} instead. Give example_inputs= for which "
                f"the forward takes this branch, or keep the layer float with exclude=['{self.layer}']."
            )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Dequantize for every function except max-pooling, and queries of shape and dtype."""
        kwargs = kwargs or {}
        name = function_name(func)
        first = args[0] if args and isinstance(args[0], Int8Tensor) else None
        if name is None and first is not None and first._float is None:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name == "max_pool2d" and first is not None and not first.pending:
            pooled = _max_pool2d(first, *args[1:], **kwargs)
            if pooled is not None:
                return pooled
        user = f"{name}()"
        result = func(*_floating(tuple(args), user), **_floating(kwargs, user))
        if first is not None:
            first._escaped |= name in _ESCAPES
            with torch._C.DisableTorchFunctionSubclass():
                # An in-place function returns the object it was called on, if that is still valid.
                if first._float is not None and result is first._float and result.shape == first.shape:
                    return first
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Dequantize for C++ callers without torch functions, such as TorchScript."""
        if func._schema.is_mutable:
            raise NetworkError(
                f"{func} changes the output of an int8 layer in place from TorchScript or C++: clone the output first."
            )
        return func(*_floating(args, str(func)), **_floating(kwargs or {}, str(func)))

    def __deepcopy__(self, memo: Any) -> Tensor:
        """A plain float tensor."""
        return self.floating().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A plain float tensor."""
        return self.floating().__reduce_ex__(protocol)


def _strides(quantized: Tensor, memory_format: torch.memory_format) -> tuple[int, ...]:
    if quantized.is_contiguous(memory_format=memory_format):
        return quantized.stride()
    if memory_format is not torch.contiguous_format:
        return torch.empty(quantized.shape, device="meta", memory_format=memory_format).stride()
    strides, step = [], 1
    for size in reversed(quantized.shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _floating(values: Any, user: str) -> Any:
    """Replace every `Int8Tensor` in lists, tuples and dictionaries by a float tensor; much faster than ``tree_map``."""
    if isinstance(values, Int8Tensor):
        return values.floating(user)
    if type(values) in (tuple, list):
        return type(values)(_floating(value, user) for value in values)
    if type(values) is dict:
        return {key: _floating(value, user) for key, value in values.items()}
    return values


def _max_pool2d(
    x: Int8Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Int8Tensor | None:
    integers = x.integers()
    if integers is None or integers.dim() != 4 or ceil_mode or return_indices:
        return None
    pooled = F.max_pool2d(integers, kernel_size, stride, padding, dilation)
    return Int8Tensor(pooled, x.layer, direct=False, memory_format=x._memory_format)


if TYPE_CHECKING:
    _Layer = nn.Module
else:
    _Layer = object


class Int8Layer(CountsCalls, nn.Module):
    """The int8 kernel of a chain; replaces its convolution or linear layer.

    Attributes:
        op: torch's quantized module, which holds the packed weight and the grid of the output.
        input_scale: Scale for float inputs; 0 if there never was one.
        input_zero_point: Zero point for float inputs.
        later_grids: Scale and zero point of input and output, for each later call with grids of its own.
        chain: The chain that the kernel computes.
        pending: The modules that the kernel computes in addition to the layer.
        subpixel: For a transposed convolution, how ``op`` replaces it.
        may_change: Names of attributes that may change after conversion; the others describe what was packed.
    """

    may_change: ClassVar[tuple[str, ...]] = ()
    op: Any
    input_scale: Tensor
    input_zero_point: Tensor
    later_grids: Tensor
    chain: Chain
    pending: tuple[str, ...]
    activation_dtype: torch.dtype
    subpixel: Subpixel | None

    def forward(self, input: Tensor) -> Tensor:
        """Run the kernel; the output behaves like a float tensor."""
        if self.chain.kind == "Linear" and self.chain.batchnorm is not None and input.dim() != 2:
            raise NetworkError(
                f"The linear layer {self.chain.name!r} has the BatchNorm {self.chain.batchnorm!r} folded in, which "
                f"needs a 2-d input, and now its input has {input.dim()} dimensions: keep the BatchNorm apart with "
                f"exclude=['{self.chain.batchnorm}']."
            )
        call = self.next_call(self.chain.calls)
        output = self.run(self._on_grid(input, call), call)
        return Int8Tensor(output, self.chain.name, self.pending, memory_format=_memory_format_of(input))

    def grids(self, call: int) -> tuple[float, int, float, int]:
        """Scale and zero point of input and output for a call."""
        if call == 0:
            return float(self.input_scale), int(self.input_zero_point), float(self.op.scale), int(self.op.zero_point)
        in_scale, in_zero_point, scale, zero_point = self.later_grids[call - 1].tolist()
        return in_scale, int(in_zero_point), scale, int(zero_point)

    def run(self, quantized: Tensor, call: int = 0) -> Tensor:
        """Run only the kernel, on and to a quantized tensor, with the output grid of a call."""
        op = self.op if call == 0 else _on_another_grid(self.op, *self.grids(call)[2:])
        rank = max(2, quantized.dim()) if self.chain.kind == "Linear" else 2 + int(self.chain.kind[-2])
        single = quantized.dim() == rank - 1
        output: Tensor = op(quantized.unsqueeze(0) if single else quantized)
        if self.chain.limit is not None:
            output = self._limited(output, self.chain.limit)
        if self.subpixel is not None:
            output = self.subpixel.shuffled(output)
        return output.squeeze(0) if single else output

    def _limited(self, output: Tensor, limit: float) -> Tensor:
        """Clamp at the activation's limit if the grid extends beyond it; usually the grid ends there itself."""
        scale, zero_point = output.q_scale(), output.q_zero_point()
        last = round(limit / scale) + zero_point
        if last >= torch.iinfo(torch.uint8 if output.dtype is torch.quint8 else torch.int8).max:
            return output
        # On the integers: QNNPACK's quantized clamp misplaces the values of channels_last tensors.
        integers = output.int_repr().clamp_(max=last)
        return torch._make_per_tensor_quantized_tensor(integers, scale, zero_point)

    def _on_grid(self, input: Tensor, call: int) -> Tensor:
        integers = None
        if isinstance(input, Int8Tensor):
            integers = input.integers()
            if integers is not None and input.direct:
                return integers
        scale, zero_point, *_ = self.grids(call)
        if integers is not None and integers.q_scale() == scale and integers.q_zero_point() == zero_point:
            return integers
        if isinstance(input, Int8Tensor):
            input = input.floating(repr(self.chain.name))
        if not scale > 0:
            raise NetworkError(
                f"The int8 layer {self.chain.name!r} got a float input, but in training it only got outputs of other "
                "quantized layers, so no range was observed for its input. Train with data for which the forward "
                f"takes this branch, or keep the layer float with exclude=['{self.chain.name}']."
            )
        return torch.quantize_per_tensor(input.float(), scale, zero_point, self.activation_dtype)

    @property
    def weight(self) -> Tensor:
        """The weight, for code that reads its dtype or device; with BatchNorm folded in it has no values."""
        pending = () if self.chain.batchnorm is None else self.pending
        return Int8Tensor(self.op.weight(), self.chain.name, pending)

    def extra_repr(self) -> str:
        """The chain."""
        return " → ".join((self.chain.kind, *self.chain.links))


def _on_another_grid(op: Any, scale: float, zero_point: int) -> Any:
    """The same op with another grid of its output, on the same packed weight; other threads may be using ``op``."""
    other = object.__new__(type(op))
    other.__dict__.update(op.__dict__, scale=scale, zero_point=zero_point)
    return other


def _memory_format_of(x: Tensor) -> torch.memory_format:
    if isinstance(x, Int8Tensor):
        return x._memory_format
    for dim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dim and x.is_contiguous(memory_format=memory_format) and not x.is_contiguous():
            return memory_format
    return torch.contiguous_format


class Int8BatchNorm(nn.Module):
    """Takes the place of a BatchNorm that is folded into an int8 layer."""

    may_change: ClassVar[tuple[str, ...]] = ()
    link: str

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input``, which is normalized already."""
        if isinstance(input, Int8Tensor) and input.pending[:1] == (self.link,):
            return input.passed(inplace=False)
        raise NetworkError(
            f"The BatchNorm {self.link!r} is folded into an int8 layer, because it followed it when the network was "
            "prepared; this time its input comes from elsewhere. Give example_inputs= for which the forward takes this "
            f"branch, or keep the BatchNorm apart with exclude=['{self.link}']."
        )


class _Int8Activation(_Layer):
    may_change: ClassVar[tuple[str, ...]] = ("inplace",)
    link: str
    inplace: bool

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input`` if an int8 layer has computed this activation already."""
        if isinstance(input, Int8Tensor) and input.pending[:1] == (self.link,):
            return input.passed(self.inplace)
        output: Tensor = super().forward(input)
        return output


class Int8ReLU(_Int8Activation, nn.ReLU):
    """`nn.ReLU` that may be fused into int8 layers."""


class Int8ReLU6(_Int8Activation, nn.ReLU6):
    """`nn.ReLU6` that may be fused into int8 layers."""


class Int8Hardtanh(_Int8Activation, nn.Hardtanh):
    """`nn.Hardtanh` that may be fused into int8 layers."""
