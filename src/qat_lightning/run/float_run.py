"""Settings of train.py that a float run may have but that cannot change its training."""

OF_QUANTIZATION = ("method", "mode", "backend", "quantization", "export", "export_formats", "baseline")
"""How the network is quantized and exported, and how the float run is shared."""

OF_SEARCH = ("ladder", "target")
"""The search of ``method=auto``, which trains a float network first."""

OF_THE_LAUNCH = (
    *("logger", "run", "ckpt_path", "float_checkpoint", "resume", "objective", "isolate", "save_int8"),
    "model.fused",
)
"""Where and how the run is launched, logged, measured and stored."""
