"""A pytest plugin that runs a directory of tests with llmint8 in the place of Inductor::

    pytest -p int8fx.testing.as_backend path/to/tests

``torch.compile`` for the backend "inductor" (named, or by default) compiles for "llmint8"; options of
Inductor's reach Inductor. Other backends stay.

Nothing else changes, but for tolerances: int8 is not as near to float as float is to itself. A
comparison by ``torch.testing.assert_close``, ``torch.allclose`` or ``Tensor.allclose`` that fails as it
was written is tried once more with

    |actual - expected| <= tolerance · max |expected|,    tolerance: ``--llmint8-tolerance``

and only for floating tensors of 32 bits or fewer, in a test in which a linear did run in int8. Every
comparison that needed it is listed at the end of the session.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from int8fx.compiler.report import Report, collect_reports

TOLERANCE = 0.05
_WIDENED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Session:
    """What the plugin did.

    Attributes:
        tolerance: of widened comparisons, relative to the largest expected value.
        options: of the backend, for every compile.
        reports: of the test that runs.
        widened: the tests with comparisons that passed only when widened, and how many.
    """

    tolerance: float
    options: Mapping[str, Any]
    test: str = ""
    reports: list[Report] = field(default_factory=list)
    graphs: int = 0
    linears: int = 0
    widened: dict[str, int] = field(default_factory=dict)

    def may_widen(self, *pairs: tuple[Any, Any]) -> bool:
        """Whether a linear is in int8 in this test, and all that is compared is floating."""
        in_int8 = any(report.accepted for report in self.reports)
        return in_int8 and all(
            _is_floating(actual) and _is_floating(wanted) for actual, wanted in pairs
        )

    def is_close(self, actual: Tensor, expected: Tensor) -> bool:
        """The comparison at the declared tolerance; counts those that need it and pass."""
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            return False
        atol = self.tolerance * float(expected.detach().abs().nan_to_num(0, 0, 0).max().item())
        close = bool(_ALLCLOSE(actual, expected.to(actual.device), rtol=0.0, atol=atol, equal_nan=True))
        if close:
            self.widened[self.test] = self.widened.get(self.test, 0) + 1
        return close


_COMPILE = torch.compile
_ALLCLOSE = torch.allclose
_ASSERT_CLOSE = torch.testing.assert_close


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _WIDENED_DTYPES and value.numel() > 0


def compile_for(session: Session) -> Callable[..., Any]:
    """``torch.compile`` with llmint8 for Inductor."""

    @functools.wraps(_COMPILE)
    def compile(
        model: Any = None, *, backend: Any = "inductor", options: Any = None, **rest: Any
    ) -> Any:
        if backend == "inductor":
            backend = "llmint8"
            options = {**session.options, **({"inductor": dict(options)} if options else {})}
        return _COMPILE(model, backend=backend, options=options or None, **rest)

    return compile


def allclose_for(session: Session) -> Callable[..., bool]:
    """``torch.allclose`` with the second try."""

    @functools.wraps(_ALLCLOSE)
    def allclose(input: Tensor, other: Tensor, *args: Any, **kwargs: Any) -> bool:
        if _ALLCLOSE(input, other, *args, **kwargs):
            return True
        return session.may_widen((input, other)) and session.is_close(input, other)

    return allclose


def assert_close_for(session: Session) -> Callable[..., None]:
    """``torch.testing.assert_close`` with the second try, tensor by tensor."""

    @functools.wraps(_ASSERT_CLOSE)
    def assert_close(actual: Any, expected: Any, **kwargs: Any) -> None:
        __tracebackhide__ = True
        try:
            _ASSERT_CLOSE(actual, expected, **kwargs)
        except AssertionError:
            pairs = list(_pairs(actual, expected))
            if not pairs or not session.may_widen(*pairs):
                raise
            if not all(session.is_close(*pair) for pair in pairs):
                raise

    return assert_close


def _pairs(actual: Any, expected: Any) -> Iterator[tuple[Any, Any]]:
    """Corresponding leaves of two containers; nothing where they differ in form."""
    if isinstance(actual, Mapping) and isinstance(expected, Mapping):
        if actual.keys() == expected.keys():
            for key in actual:
                yield from _pairs(actual[key], expected[key])
        else:
            yield None, None
    elif isinstance(actual, (list, tuple)) and isinstance(expected, (list, tuple)):
        if len(actual) == len(expected):
            for one, other in zip(actual, expected, strict=True):
                yield from _pairs(one, other)
        else:
            yield None, None
    else:
        yield actual, expected


# --- pytest's hooks -------------------------------------------------------------------------------

_KEY = pytest.StashKey[Session]()
_PATCHES = pytest.StashKey[pytest.MonkeyPatch]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("llmint8", "llmint8 in the place of Inductor")
    group.addoption(
        "--llmint8-tolerance",
        type=float,
        default=TOLERANCE,
        help="of comparisons that fail as written, relative to the largest expected value; "
        "0: widen nothing (default: %(default)s)",
    )
    group.addoption(
        "--llmint8-options",
        type=json.loads,
        default={},
        help="the backend's options, as JSON",
    )


def pytest_configure(config: pytest.Config) -> None:
    tolerance = config.getoption("--llmint8-tolerance")
    if not tolerance >= 0:
        raise pytest.UsageError(f"--llmint8-tolerance={tolerance}: allowed is a number >= 0")
    session = Session(tolerance, config.getoption("--llmint8-options"))
    patches = pytest.MonkeyPatch()
    patches.setattr(torch, "compile", compile_for(session))
    if tolerance > 0:
        allclose = allclose_for(session)
        patches.setattr(torch, "allclose", allclose)
        patches.setattr(Tensor, "allclose", allclose)
        patches.setattr(torch.testing, "assert_close", assert_close_for(session))
    config.stash[_KEY], config.stash[_PATCHES] = session, patches


def pytest_unconfigure(config: pytest.Config) -> None:
    patches = config.stash.get(_PATCHES, None)
    if patches is not None:
        patches.undo()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    session = item.config.stash[_KEY]
    with collect_reports() as reports:
        session.test, session.reports = item.nodeid, reports
        result = yield
    session.graphs += len(reports)
    session.linears += sum(len(report.accepted) for report in reports)
    return result  # type: ignore[return-value]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash[_KEY]
    terminalreporter.section("llmint8 in the place of Inductor")
    terminalreporter.line(f"{session.graphs} graphs compiled, {session.linears} linears in int8")
    terminalreporter.line(
        f"{sum(session.widened.values())} comparisons needed the tolerance of {session.tolerance} "
        "of the largest expected value"
    )
    for test, count in session.widened.items():
        terminalreporter.line(f"  {count}  {test}")
