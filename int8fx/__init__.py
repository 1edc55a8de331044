"""LLM.int8() as a torch.compile backend: ``torch.compile(model, backend="llmint8")``."""

import int8fx_autoload
from int8fx.version import __version__ as __version__

int8fx_autoload.register()

if int8fx_autoload.light:  # the rest comes with torch
    int8fx_autoload.after_import("torch", int8fx_autoload.make_whole)
else:
    import int8fx.kernels.devices  # the rows of the kernel table
    import int8fx.weights.operators  # noqa: F401  what torch's operators do with a QuantizedWeight
    from int8fx.ahead.model import load
    from int8fx.analysis.calibrate import calibrate
    from int8fx.analysis.explain import explain
    from int8fx.analysis.explanation.explanation import Explanation
    from int8fx.analysis.suggest import Suggestion, suggest
    from int8fx.backend import llmint8
    from int8fx.calibration import Calibration
    from int8fx.compiler.report import Report, collect_reports
    from int8fx.kernels.schemes.table import SCHEMES
    from int8fx.options import Options
    from int8fx.options_file import load_options
    from int8fx.weights.changes import refresh
    from int8fx.weights.checkpoint import load_checkpoint, save_checkpoint
    from int8fx.weights.qat import convert_qat_, prepare_qat_
    from int8fx.weights.quantize import decisions, dequantize_, quantize_
    from int8fx.weights.tensor import Int8Weight, QuantizedWeight

__all__ = [
    "SCHEMES",
    "Calibration",
    "Explanation",
    "Int8Weight",
    "Options",
    "QuantizedWeight",
    "Report",
    "Suggestion",
    "calibrate",
    "collect_reports",
    "convert_qat_",
    "decisions",
    "dequantize_",
    "explain",
    "llmint8",
    "load",
    "load_checkpoint",
    "load_options",
    "prepare_qat_",
    "quantize_",
    "refresh",
    "save_checkpoint",
    "suggest",
]
