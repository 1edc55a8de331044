"""Tells whoever asks ``torch.compile`` for "llmint8" and then runs without one int8 linear.

torch calls a backend with graphs, and for nothing else. It does not say when a model is wrapped, nor
when a method of the wrapper runs the model uncompiled, as ``generate`` of transformers does::

    model = torch.compile(model, backend="llmint8")
    model.generate(...)      # the wrapper passes generate on to the model that it wraps: float
    model.compile(backend="llmint8")
    model.generate(...)      # int8: the model itself is compiled

So three places look, and each tells once: ``generate`` (``int8fx/integrations/generation.py``), the
first compile in which no linear is in int8, and the end of the process.
"""

import atexit
import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from int8fx import torch_private
from int8fx.compiler.report import Report
from int8fx.passes.linears.select import REQUIRES_GRAD

log = logging.getLogger(__name__)

IN_PLACE = (
    'model.compile(backend="llmint8") compiles the model in place, and with it generate and every '
    "other method that calls it"
)


class Watch:
    """What came of the requests for a backend in this process.

    Attributes:
        backend: as ``torch.compile`` was given it, or found it by its name.
        graphs, linears: how many graphs reached it, and how many linears are in int8 in them.
    """

    def __init__(self, backend: Callable[..., Any]) -> None:
        self.backend = backend
        self.graphs = 0
        self.linears = 0
        self._told = False
        atexit.register(self.at_exit)

    def compiled(self, reports: Sequence[Report]) -> None:
        """A graph was compiled."""
        self.linears += sum(len(report.accepted) for report in reports)
        reasons = Counter(each.reason for report in reports for each in report.refused)
        # Of weights that require grad the user was warned already.
        if self._told or self.linears or not reasons.keys() - {REQUIRES_GRAD}:
            return
        self._told = True
        listed = "".join(f"\n  {count} x {reason}" for reason, count in reasons.most_common(3))
        log.warning("llmint8 compiled a graph without one int8 linear:%s", listed)

    def at_exit(self) -> None:
        # What an exception ended need not have come so far.
        if self.linears or hasattr(sys, "last_value") or not torch_private.requests(self.backend):
            return
        if self.graphs == 0:
            log.warning(
                "torch.compile was asked for llmint8, and no graph reached it: what it returned was "
                "not called, or ran without being compiled. %s",
                IN_PLACE,
            )
        elif not self._told:
            log.warning(
                "llmint8 compiled %d graphs without one int8 linear; "
                'TORCH_LOGS="+int8fx" in the environment shows why',
                self.graphs,
            )
