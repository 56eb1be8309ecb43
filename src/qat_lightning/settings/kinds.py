"""Which kinds of quantization each mode and backend supports: one table, read by errors, docs and tests."""

from __future__ import annotations

import warnings

from qat_lightning.errors import CombinationError, ConfigurationError
from qat_lightning.settings.backends import BACKENDS, MODES, get_backend, pairs
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme

DIRECT = ("dynamic", "weight_only")
"""The kinds that need no activation ranges: a float network is converted directly."""

_XNNPACK_WEIGHTS = (
    "XNNPACK has no kernel for float inputs and integer weights: use kind='dynamic' or kind='static', or backend='x86'"
)

_TENSORRT_RANGES = "TensorRT's int8 kernels need fixed ranges: use kind='static', or backend='x86'"

_OWN_GRIDS = (
    "its quantizer defines grids for static networks only: use kind='qat' (in QuantizationAwareTraining "
    "kind='static') or kind='static', or backend='x86'"
)

_BY_PARTS = "it needs no captured graph, so use mode='eager', which reaches the layers of every network"

UNSUPPORTED: dict[tuple[str, str, str], str] = {
    **{(kind, "parts", backend): _BY_PARTS for kind in DIRECT for backend in BACKENDS},
    ("weight_only", "pt2e", "xnnpack"): _XNNPACK_WEIGHTS,
    ("weight_only", "pt2e", "tensorrt"): _TENSORRT_RANGES,
    ("dynamic", "pt2e", "tensorrt"): _TENSORRT_RANGES,
}
"""For each kind, the pairs of mode and backend that do not support it, and why."""


def supported(kind: str) -> list[tuple[str, str]]:
    """Every pair of mode and backend that supports a kind.

    Example:
        >>> ("pt2e", "xnnpack") in supported("dynamic"), ("pt2e", "xnnpack") in supported("weight_only")
        (True, False)
    """
    return [pair for pair in pairs() if not _why_not(kind, *pair)]


def _why_not(kind: str, mode: str, backend: str) -> str:
    """Why a supported pair of mode and backend does not support a kind; empty if it does."""
    if kind in DIRECT and get_backend(backend, mode).own_grids:
        return _OWN_GRIDS
    return UNSUPPORTED.get((kind, mode, backend), "")


def check_kind(recipe: Recipe) -> None:
    """Reject a kind, or settings of the scheme, that the mode and backend do not support.

    Settings of activations that the kind does not use raise no error, so that one scheme works for a sweep over
    methods; a warning names them.

    Raises:
        CombinationError: The mode and backend do not support the kind; the message names an alternative.
        ConfigurationError: The kind does not support the scheme; the message names an alternative.

    Example:
        >>> check_kind(Recipe("pt2e", "x86", Scheme(weight_symmetric=False), kind="weight_only"))
        >>> try:
        ...     check_kind(Recipe("pt2e", "xnnpack", kind="weight_only"))
        ... except ConfigurationError as error:
        ...     str(error)[:82]
        "kind='weight_only' is not supported for mode='pt2e' and backend='xnnpack': XNNPACK"
    """
    reason = _why_not(recipe.kind, recipe.mode, recipe.backend)
    if reason:
        raise CombinationError(
            f"kind={recipe.kind!r} is not supported for mode={recipe.mode!r} and backend={recipe.backend!r}: {reason}."
        )
    for own in recipe.each:
        if recipe.kind == "dynamic":
            _check_dynamic(own)
        if recipe.kind in DIRECT:
            _warn_of_unused(own)


def _check_dynamic(recipe: Recipe) -> None:
    scheme = recipe.scheme
    if recipe.by_token_or_group and recipe.mode == "pt2e":
        field = "activation_granularity" if scheme.activation_granularity == "per_token" else "weight_granularity"
        raise CombinationError(
            f"scheme.{field}={getattr(scheme, field)!r} is not supported for kind='dynamic' in mode='pt2e': its "
            "kernels have one range per activation tensor and one scale per output channel: use mode='fx' or 'eager'."
        )
    for field, value, usual in (
        ("weight_symmetric", scheme.weight_symmetric, True),
        ("activation_bits", scheme.activation_bits, 8),
        ("activation_symmetric", scheme.activation_symmetric and scheme.activation_granularity != "per_token", False),
    ):
        if value != usual:
            raise ConfigurationError(
                f"scheme.{field}={value!r} is not supported with kind='dynamic', whose kernels support symmetric "
                f"weights and compute an affine 8-bit range in each call: use scheme.{field}={usual!r}."
            )


def _warn_of_unused(recipe: Recipe) -> None:
    usual = Scheme()
    fields = ["activation_bits", "activation_symmetric", "activation_observer"]
    if recipe.kind == "weight_only":
        fields.append("activation_granularity")
    elif recipe.scheme.activation_granularity == "per_token":
        fields.remove("activation_symmetric")
    unused = [
        f"scheme.{field}={getattr(recipe.scheme, field)!r}"
        for field in fields
        if getattr(recipe.scheme, field) != getattr(usual, field)
    ]
    if not unused:
        return
    why = "computes the range of activations in each call" if recipe.kind == "dynamic" else "leaves activations float"
    # The stack level is this function for every caller, so that each recipe is warned of only once.
    warnings.warn(f"kind={recipe.kind!r} {why}, and does not use {', '.join(unused)}.", stacklevel=1)


def table() -> dict[tuple[str, str, str], str]:
    """For each kind without calibration, mode and backend: empty if supported, otherwise the reason why not."""
    rows = {}
    for kind in DIRECT:
        for mode in MODES:
            for backend in BACKENDS:
                try:
                    get_backend(backend, mode)
                except ConfigurationError as error:
                    rows[kind, mode, backend] = str(error)
                else:
                    rows[kind, mode, backend] = _why_not(kind, mode, backend)
    return rows
