"""Sums that stay unrounded because only float ops read them, by the names of their ops in any graph."""

FLOAT_READERS = frozenset(
    {"softmax", "_softmax", "_safe_softmax", "log_softmax", "layer_norm", "native_layer_norm", "rms_norm", "group_norm"}
)
"""Softmax and normalizations, which are float in every backend."""

SUMS = frozenset({"add", "iadd", "add_", "sub", "isub", "sub_", "masked_fill", "masked_fill_", "where"})
"""Additions, and ops that mask values."""
