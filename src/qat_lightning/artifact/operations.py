"""The operations that the file of an int8 network may call: computations on tensors and numbers, by name.

A graph names functions and methods. Only names listed here are looked up, and each of them only computes: none reads or
writes a file, imports, compiles, or changes a setting of the process.
"""

from __future__ import annotations

import functools
import importlib
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
import torch.nn.functional as F
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from qat_lightning.errors import ArtifactError
from qat_lightning.graph.assignment import assigned
from qat_lightning.layers.padding import pad


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


_COMPUTE = words(
    """
    abs absolute acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool1d_with_indices adaptive_max_pool2d adaptive_max_pool2d_with_indices adaptive_max_pool3d
    adaptive_max_pool3d_with_indices add addbmm addcdiv addcmul addmm addmv addr adjoint affine_grid
    affine_grid_generator all allclose alpha_dropout amax amin aminmax angle any arange arccos arccosh arcsin
    arcsinh arctan arctan2 arctanh argmax argmin argsort argwhere asin asinh atan atan2 atanh atleast_1d atleast_2d
    atleast_3d avg_pool1d avg_pool2d avg_pool3d baddbmm bartlett_window batch_norm bilinear bincount bitwise_and
    bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor blackman_window block_diag bmm
    broadcast_tensors broadcast_to bucketize cartesian_prod cat cdist ceil celu chain_matmul channel_shuffle chunk
    clamp clamp_max clamp_min clip clone column_stack combinations complex concat concatenate conj conj_physical
    constant_pad_nd conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution
    copysign corrcoef cos cosh cosine_similarity count_nonzero cov cross cummax cummin cumprod cumsum deg2rad
    dequantize det detach diag diag_embed diagflat diagonal diagonal_scatter diff digamma dist div divide dot
    dropout dropout1d dropout2d dropout3d dsplit dstack einsum elu embedding embedding_bag empty empty_like eq equal
    erf erfc erfinv exp exp2 expit expm1 eye feature_alpha_dropout feature_dropout fft fft2 fftn fftshift fix
    flatten flip fliplr flipud float_power floor floor_divide fmax fmin fmod fold frac full full_like gather ge gelu
    glu greater greater_equal grid_sample grid_sampler grid_sampler_2d grid_sampler_3d group_norm grouped_mm gt
    gumbel_softmax hamming_window hann_window hardshrink hardsigmoid hardswish hardtanh heaviside histc hsplit
    hstack hypot ifft ifft2 ifftn ifftshift igamma igammac imag index_add index_copy index_fill index_put
    index_reduce index_select inner instance_norm int_repr interpolate inverse irfft irfft2 irfftn is_complex
    is_floating_point isclose isfinite isin isinf isnan isneginf isposinf isreal istft kaiser_window kron kthvalue
    layer_norm ldexp le leaky_relu lerp less less_equal lgamma linear linspace local_response_norm log log10 log1p
    log2 log_sigmoid log_softmax logaddexp logaddexp2 logcumsumexp logdet logical_and logical_not logical_or
    logical_xor logit logsigmoid logspace logsumexp lp_pool1d lp_pool2d lp_pool3d lt masked_fill masked_scatter
    masked_select matmul matrix_exp matrix_norm matrix_power max max_pool1d max_pool1d_with_indices max_pool2d
    max_pool2d_with_indices max_pool3d max_pool3d_with_indices max_unpool1d max_unpool2d max_unpool3d maximum mean
    median meshgrid min minimum mish mm moveaxis movedim msort mul multi_head_attention_forward multinomial multiply
    mv mvlgamma nan_to_num nanmean nanmedian nansum narrow native_batch_norm native_channel_shuffle
    native_group_norm native_layer_norm ne neg negative nonzero norm normalize not_equal numel one_hot ones
    ones_like outer pad pairwise_distance permute pinv pinverse pixel_shuffle pixel_unshuffle polar polygamma
    positive pow prelu prod quantile quantize_per_channel quantize_per_tensor rad2deg rand rand_like randint randn
    randn_like randperm ravel real reciprocal relu relu6 remainder renorm repeat_interleave reshape rfft rfft2 rfftn
    rms_norm roll rot90 round row_stack rrelu rsqrt rsub scalar_tensor scaled_dot_product_attention scatter
    scatter_add scatter_reduce searchsorted select select_scatter selu sgn sigmoid sign signbit silu sin sinc sinh
    slice_scatter slogdet softmax softmin softplus softshrink softsign solve sort split split_with_sizes sqrt square
    squeeze stack std std_mean stft sub subtract sum svd svdvals swapaxes swapdims t take take_along_dim tan tanh
    tanhshrink tensor_split tensordot threshold tile topk trace transpose tril tril_indices triu triu_indices
    true_divide trunc unbind unflatten unfold unique unique_consecutive unravel_index unsqueeze upsample vander var
    var_mean vdot vecdot vector_norm view_as_complex view_as_real vsplit vstack where xlogy zeros zeros_like
    """
)
"""Computations: as functions, methods and aten ops, also in place (with ``_`` appended)."""
_LOSSES = words(
    """
    binary_cross_entropy binary_cross_entropy_with_logits cosine_embedding_loss cross_entropy cross_entropy_loss
    ctc_loss gaussian_nll_loss hinge_embedding_loss huber_loss kl_div l1_loss margin_ranking_loss mse_loss
    multi_margin_loss multilabel_margin_loss multilabel_margin_loss_forward multilabel_soft_margin_loss nll_loss
    nll_loss2d nll_loss2d_forward nll_loss_forward nll_loss_nd poisson_nll_loss smooth_l1_loss soft_margin_loss
    triplet_margin_loss
    """
)
"""Losses, for networks that compute their own: functions and aten ops."""
_FUNCTIONS_ONLY = words("tensor as_tensor sym_float sym_int sym_ite sym_max sym_min sym_not sym_sum _assert")
_METHODS_ONLY = words(
    """
    bfloat16 bool byte char contiguous copy cpu dim double element_size exponential expand expand_as fill fill_diagonal
    float half int is_contiguous is_signed item log_normal long masked_fill ndimension new_empty new_full new_ones
    new_tensor new_zeros nelement normal q_scale q_zero_point repeat reshape_as short size stride sum_to_size to
    type_as uniform view view_as zero
    """
)
_ATEN_ONLY = words(
    """
    _adaptive_avg_pool2d _adaptive_avg_pool3d _local_scalar_dense _log_softmax _native_batch_norm_legit_no_training
    _safe_softmax _softmax _to_copy _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa __and__ __or__ __xor__
    __lshift__ __rshift__ alias bitwise_not col2im contiguous copy expand expand_as fft_fft fft_fft2 fft_fftn fft_ifft
    fft_ifft2 fft_ifftn fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn fill grid_sampler gru gru_cell
    im2col index item lift_fresh_copy linalg_cross linalg_matrix_norm linalg_norm linalg_vecdot linalg_vector_norm lstm
    lstm_cell matmul native_dropout new_empty new_full new_ones new_zeros pixel_shuffle reflection_pad1d
    reflection_pad2d reflection_pad3d repeat replication_pad1d replication_pad2d replication_pad3d reshape_as rnn_relu
    rnn_relu_cell rnn_tanh rnn_tanh_cell scalar_tensor size slice sym_numel sym_size sym_storage_offset sym_stride to
    type_as upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d upsample_trilinear3d view view_as zero
    """
)
_QUANTIZED = words(
    """
    add add_relu add_scalar add_scalar_relu batch_norm batch_norm1d batch_norm1d_relu batch_norm2d batch_norm2d_relu
    batch_norm3d batch_norm3d_relu batch_norm_relu cat cat_relu celu clamp conv1d conv1d_relu conv2d conv2d_add
    conv2d_add_relu conv2d_relu conv3d conv3d_relu conv_transpose1d conv_transpose2d conv_transpose3d dropout elu
    group_norm hardswish instance_norm layer_norm leaky_relu linear linear_leaky_relu linear_relu linear_tanh matmul
    max_pool1d max_pool2d mul mul_relu mul_scalar mul_scalar_relu prelu relu6 sigmoid softmax threshold
    """
)
_DECOMPOSED = words(
    """
    choose_qparams convert_element_type dequantize_per_channel dequantize_per_tensor quantize_per_channel
    quantize_per_tensor
    """
)
_HIGHER_ORDER = frozenset({"cond", "wrap_with_autocast", "wrap_with_set_grad_enabled"})
_OPERATORS = words(
    """
    abs add and_ contains eq floordiv ge getitem gt iadd iand ifloordiv imul invert ior ipow isub itruediv le lt matmul
    mod mul ne neg not_ or_ pos pow rshift lshift setitem sub truediv xor
    """
)
_MATH = words("ceil floor sqrt trunc log log2 exp prod")

ATTRIBUTES = words("H T device dtype imag is_quantized layout mH mT ndim real shape")
"""Attributes of a tensor that a graph may read with ``getattr``."""
METHODS = frozenset(
    name
    for base in _COMPUTE | _METHODS_ONLY
    for name in (base, f"{base}_")
    if callable(getattr(torch.Tensor, name, None))
)
"""Methods of tensors that a graph may call."""

_NAMESPACES: dict[str, frozenset[str]] = {
    "aten": _COMPUTE | _LOSSES | _ATEN_ONLY,
    "quantized": _QUANTIZED,
    "quantized_decomposed": _DECOMPOSED,
}


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    spaces: list[tuple[str, Any, frozenset[str]]] = [
        ("torch", torch, _COMPUTE | _FUNCTIONS_ONLY),
        ("torch.nn.functional", F, _COMPUTE | _LOSSES),
        ("torch.linalg", torch.linalg, _COMPUTE),
        ("torch.fft", torch.fft, _COMPUTE),
        ("torch.special", torch.special, _COMPUTE),
        ("operator", operator, _OPERATORS),
        ("math", math, _MATH),
    ]
    table: dict[str, Callable[..., Any]] = {
        "getattr": getattr,
        "qat_lightning.pad": pad,
        "qat_lightning.assigned": assigned,
    }
    for prefix, space, names in spaces:
        for base in sorted(names):
            for name in (base, f"{base}_"):
                function = getattr(space, name, None)
                if callable(function) and not isinstance(function, type):
                    table[f"{prefix}.{name}"] = function
    return table


@functools.cache
def _names() -> dict[Callable[..., Any], str]:
    return {function: name for name, function in reversed(_functions().items())}


def name_of(function: Any) -> str:
    """The name under which a file stores a function of a graph.

    Returns:
        A name for `function_of`; it contains a colon if only a trusted file may call the function.

    Raises:
        ArtifactError: The function cannot be found by any name.

    Example:
        >>> name_of(torch.relu), name_of(torch.ops.aten.relu.default)
        ('torch.relu', 'torch.ops.aten.relu.default')
    """
    if isinstance(function, OpOverload):
        packet = function._opname
        return f"torch.ops.{function.namespace}.{packet}.{function._overloadname}"
    if isinstance(function, OpOverloadPacket):
        return "torch.ops." + function._qualified_op_name.replace("::", ".")
    if isinstance(function, HigherOrderOperator):
        return f"torch.ops.higher_order.{function.name()}"
    name = _names().get(function)
    if name is not None:
        return name
    base = getattr(function, "__name__", "")
    if getattr(torch, base, None) is function:  # functions of torch that are written in C++ do not know their module
        return f"torch:{base}"
    name = f"{getattr(function, '__module__', None)}:{getattr(function, '__qualname__', None)}"
    try:
        found = _imported(name)
    except (ImportError, AttributeError, ValueError):
        found = None
    if found is not function:
        raise ArtifactError(
            f"calls {getattr(function, '__qualname__', function)!r}, a function that cannot be found by its name: "
            "define it at the top of a module"
        )
    return name


def is_allowed(name: str) -> bool:
    """Whether any file may call the function with this name.

    Example:
        >>> is_allowed("torch.relu"), is_allowed("os:system"), is_allowed("torch.ops.aten.from_file.default")
        (True, False, False)
    """
    if name in _functions():
        return True
    parts = name.split(".")
    if parts[:2] != ["torch", "ops"] or len(parts) not in (4, 5):
        return False
    space, op = parts[2:4]
    if space == "higher_order":
        return len(parts) == 4 and op in _HIGHER_ORDER
    if space not in _NAMESPACES:
        return False
    base = op if op in _NAMESPACES[space] else op.removesuffix("_")
    return base in _NAMESPACES[space] and (len(parts) == 4 or parts[4].replace("_", "a").isalnum())


def function_of(name: str, *, trusted: bool = False) -> Callable[..., Any]:
    """Look a function up.

    Args:
        name: Result of `name_of`.
        trusted: Whether functions that are not listed may be imported.

    Raises:
        ArtifactError: The name is not listed, or this release of PyTorch has no such function.
    """
    if name in _functions():
        return _functions()[name]
    if not is_allowed(name) and not trusted:
        raise ArtifactError(
            f"it calls {name[:80]!r}, which files are not allowed to call. If you trust the file, and have the code "
            "that defines it, use load_quantized(path, trusted=True)"
        )
    try:
        found = _operator_of(name) if name.startswith("torch.ops.") else _imported(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArtifactError(
            f"it calls {name[:80]!r}, which does not exist in torch {torch.__version__}: {error}"
        ) from error
    if not callable(found):
        raise ArtifactError(f"it calls {name[:80]!r}, which cannot be called")
    result: Callable[..., Any] = found
    return result


def _operator_of(name: str) -> Any:
    found: Any = torch.ops
    for part in name.split(".")[2:]:
        found = getattr(found, part)
    if not isinstance(found, (OpOverload, OpOverloadPacket, HigherOrderOperator)):
        raise ValueError("it is no operator")
    return found


def _imported(name: str) -> Any:
    module, separator, path = name.partition(":")
    if not separator:
        raise ValueError("it names no module")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found
