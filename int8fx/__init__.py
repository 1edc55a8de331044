"""LLM.int8() as a torch.compile backend: ``torch.compile(model, backend="llmint8")``."""

import int8fx_autoload
from int8fx.backend import llmint8
from int8fx.changes import refresh
from int8fx.checkpoint import load_checkpoint, save_checkpoint
from int8fx.explain import explain
from int8fx.explanation import Explanation
from int8fx.kernels.schemes.table import SCHEMES
from int8fx.options import Options
from int8fx.quantize import decisions, dequantize_, quantize_
from int8fx.quantized_weight import Int8Weight
from int8fx.report import Report, collect_reports
from int8fx.suggest import Suggestion, suggest

int8fx_autoload.register()

__version__ = "0.1.0"
__all__ = [
    "SCHEMES",
    "Explanation",
    "Int8Weight",
    "Options",
    "Report",
    "Suggestion",
    "collect_reports",
    "decisions",
    "dequantize_",
    "explain",
    "llmint8",
    "load_checkpoint",
    "quantize_",
    "refresh",
    "save_checkpoint",
    "suggest",
]
