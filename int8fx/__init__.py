"""LLM.int8() as a torch.compile backend: ``torch.compile(model, backend="llmint8")``."""

from int8fx.backend import llmint8
from int8fx.explain import explain
from int8fx.explanation import Explanation
from int8fx.kernels.schemes.table import SCHEMES
from int8fx.options import Options
from int8fx.report import Report, collect_reports
from int8fx.suggest import Suggestion, suggest

__version__ = "0.1.0"
__all__ = [
    "SCHEMES",
    "Explanation",
    "Options",
    "Report",
    "Suggestion",
    "collect_reports",
    "explain",
    "llmint8",
    "suggest",
]
