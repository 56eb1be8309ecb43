"""Int8 networks as files of real runtimes: one file here for each format."""

from qat_lightning.export.formats import FORMATS, get_format
from qat_lightning.export.result import ExportResult, export_table, fastest
from qat_lightning.export.run import export_quantized
from qat_lightning.export.torchao import save_torchao, to_torchao

__all__ = [
    "FORMATS",
    "ExportResult",
    "export_quantized",
    "export_table",
    "fastest",
    "get_format",
    "save_torchao",
    "to_torchao",
]
