"""Every architecture of transformers at toy size under llmint8: what compiles, and what agrees.

    python benchmarks/coverage.py                       # all that is not in the results yet
    python benchmarks/coverage.py --only 'qwen*'        # these, again
    python benchmarks/coverage.py --table               # coverage.md from the results

Each architecture is built from its configuration, shrunk (``tests/toy_models.py``), in a process of
its own with a time limit. There it is

1. run in eager fp32;
2. traced by Dynamo for a backend that compiles nothing: its graph breaks are Inductor's, too;
3. run through the rewritten graph without Inductor, twice (``tests/checked.py``): each int8 linear
   against float64 and the derived bound, and with exact products in their place, when nothing may
   differ from eager but rounding;
4. compiled with llmint8 and run twice as in step 3: the linears that Inductor's code calls against
   their bound, and the whole output with exact products against eager's;
5. if that fails, compiled with Inductor alone, to tell whose fault it is.

It *agrees* if every linear is within its bound, there is no new graph break, and the compiled outputs
with exact products differ by no more than ``EXACT`` from eager's, or from those of Inductor alone.
Whole outputs in int8 are shown, and not judged by a bound: what surrounds a linear amplifies its
rounding, and a router or an argmax may tip over.
"""

import argparse
import collections
import fnmatch
import functools
import gc
import json
import os
import re
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import int8fx  # noqa: E402
from int8fx.testing.checked import Seen, checking  # noqa: E402
from int8fx.testing.routers import apart_from_quantize, is_ranked  # noqa: E402
from int8fx.testing.toy_models import Toy, architectures, build  # noqa: E402
from int8fx.torch_private import compile_counts  # noqa: E402

RESULTS = Path(__file__).with_suffix(".jsonl")  # kept with the code: a sweep takes hours
LIMIT = 240  # seconds of processor time for one architecture, unless told otherwise
INDUCTOR_ONLY = "fails under llmint8 only"
EXACT = 1e-3  # relative error of a whole output with exact products, in fp32


# --- one architecture -----------------------------------------------------------------------------


def tensors(value: Any) -> Iterator[Tensor]:
    """The floating tensors of a model's output, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def relative_error(y: Any, expected: Any) -> float:
    """The largest ``|y - expected| / |expected|`` over the output's tensors, in the 2-norm."""
    worst = 0.0
    pairs = list(zip(tensors(y), tensors(expected), strict=True))
    for got, wanted in pairs:
        if got.shape != wanted.shape:
            return float("inf")
        usual = wanted.isfinite()
        if (got.isfinite() != usual).any():
            return float("inf")
        size = wanted[usual].double().norm()
        if size > 0:
            worst = max(worst, float((got[usual].double() - wanted[usual].double()).norm() / size))
    return worst


def compiled(toy: Toy, backend: str) -> Callable[[], Any]:
    """A call of the toy under a backend, from a Dynamo that knows nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = torch.compile(toy.model, backend=backend)

    def call() -> Any:
        torch.manual_seed(0)
        with torch.no_grad():
            return model(**toy.inputs)

    return call


def call(toy: Toy, backend: str) -> tuple[Any, int, int]:
    """The output under a backend, and how many graphs and graph breaks Dynamo made."""
    return compiled(toy, backend)(), *compile_counts()


def examine(name: str, compiles: bool = True) -> dict[str, Any]:
    """One row of the results; without step 4 if asked for."""
    row: dict[str, Any] = {"architecture": name}
    try:
        toy = build(name)
    except (LookupError, RuntimeError) as error:
        return row | {"status": "not built", "why": str(error)}
    row |= {"task": toy.task, "class": type(toy.model).__name__, "recipe": toy.recipe}
    row |= {"inputs": list(toy.inputs)}
    try:
        _, row["graphs"], row["breaks"] = call(toy, "eager")
    except Exception as error:
        return row | {"status": "not traced", "why": first_line(error)}
    try:
        checked, found = check_linears(toy)
        row |= found | {"status": "checked"}
        if compiles:
            row |= compile_llmint8(toy, checked)
    except Exception as error:
        row["why"] = first_line(error)
        row["trace"] = traceback.format_exc()[-3000:]
        row["status"] = INDUCTOR_ONLY if works(toy, "inductor") else "fails under Inductor"
    return row


def check_linears(toy: Toy) -> tuple[Any, dict[str, Any]]:
    """Step 3: the output in int8, and the row's entries."""
    with checking() as seen, int8fx.collect_reports() as reports:
        y, exact = run_twice(toy, seen)
        graphs, breaks = compile_counts()
    exact_error = relative_error(exact, toy.expected)
    # Where that is not small, what Dynamo alone makes of the model tells whose error it is.
    dynamo_error = None
    if exact_error > EXACT:
        dynamo_error = relative_error(call(toy, "eager")[0], toy.expected)
    decisions = [decision for report in reports for decision in report.decisions]
    refused = collections.Counter(
        re.sub(r"'[^']*'|\d+", "…", decision.reason) for decision in decisions if not decision.accepted
    )
    return y, {
        "llmint8 graphs": graphs,
        "llmint8 breaks": breaks,
        "linears": sum(decision.accepted for decision in decisions),
        "refused": dict(refused),
        "ranked": {each.path: each.reason for each in decisions if is_ranked(each)},
        "quantize_ apart": apart_from_quantize(toy.model, decisions),
        "share": seen.share,
        "worst": seen.worst,
        "worst call": seen.worst_call,
        "exact error": exact_error,
        "dynamo error": dynamo_error,
        "checked error": relative_error(y, toy.expected),
    }


def compile_llmint8(toy: Toy, checked: Any) -> dict[str, Any]:
    """Step 4: the row's entries."""
    started = os.times()
    with checking(inductor=True) as seen:
        y, exact = run_twice(toy, seen)
    seconds = sum(os.times()[:4]) - sum(started[:4])
    exact_error = relative_error(exact, toy.expected)
    # Inductor draws other random numbers than eager, for instance.
    from_inductor = None
    if exact_error > EXACT:
        from_inductor = relative_error(exact, call(toy, "inductor")[0])
    return {
        "status": "compiled",
        "compiled linears": seen.linears,
        "compiled worst": seen.worst,
        "compiled exact error": exact_error,
        "from inductor": from_inductor,
        "error": relative_error(y, toy.expected),
        "apart": relative_error(y, checked),
        "seconds": round(seconds, 1),  # of processors, the C++ compiler's included
    }


def run_twice(toy: Toy, seen: Seen) -> tuple[Any, Any]:
    """The output in int8, and with exact products."""
    run = compiled(toy, "llmint8")
    y = run()
    seen.exact = True
    return y, run()


def works(toy: Toy, backend: str) -> bool:
    try:
        call(toy, backend)
    except Exception:
        return False
    return True


def first_line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text[:400]


# --- the table ------------------------------------------------------------------------------------

HEAD = """# Architectures of transformers under llmint8

transformers {transformers}, torch {torch}. Written by `python benchmarks/coverage.py --table`; its
docstring says what is done with each architecture. Toy sizes, random weights, fp32.

- **breaks**: graph breaks of Dynamo, for Inductor and for llmint8.
- **linears**: how many run in int8.
- **share**: of the operations of all linears and matmuls in the graph (fused attention and
  convolutions are neither).
- **bound**: the largest error of a linear over the bound derived for it; above 1 is a bug.
- **exact**: relative error of the whole output with exact products in the place of the int8 ones:
  what the rewriting itself did, and then what the rewriting and Inductor did.
- **int8**: relative error of the whole output.
- **apart**: relative difference of the compiled output and the interpreted graph's, both in int8. One
  value that rounding in the float part tips over to the next integer moves a linear's input by 1/127.

"""

COLUMNS = (
    *("architecture", "task", "class", "llmint8", "breaks", "linears", "share"),
    *("bound", "exact", "int8", "apart", "left in float"),
)


def alike_under_dynamo(rows: list[dict[str, Any]]) -> str:
    """Names those that differ from eager as much with ``backend="eager"``, in which nothing is ours."""
    alike = [
        row["architecture"]
        for row in rows
        if row.get("dynamo error") and abs(row["exact error"] / row["dynamo error"] - 1) < 0.01
    ]
    if not alike:
        return ""
    return f'Under Dynamo alone (`backend="eager"`) {", ".join(alike)} differ from it as much.'


def ranked_table(rows: list[dict[str, Any]]) -> list[str]:
    """What is ranked or compared in each architecture, and whether ``quantize_`` leaves the same."""
    lines = [
        "## What is ranked stays in float",
        "",
        "Routers, indexers, codebooks and whatever else is ranked or compared, as the graph shows it. "
        "Architectures with groups of experts have two groups of two here. **apart**: linears that the "
        "backend and `quantize_` decide differently on. Results without these entries are not shown.",
        "",
        "| architecture | ranked | apart |",
        "|---|---|---|",
    ]
    for row in rows:
        if not row.get("ranked") and not row.get("quantize_ apart"):
            continue
        counts = collections.Counter(
            f"{re.sub(r'[0-9]+', '*', path)}: {re.sub(r'.*output is |[)]$', '', reason)}"
            for path, reason in row["ranked"].items()
        )
        ranked = "; ".join(f"{what} ({count})" for what, count in counts.items())
        lines.append(f"| {row['architecture']} | {ranked} | {', '.join(row['quantize_ apart'])} |")
    return lines


def number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def table_row(row: dict[str, Any]) -> str:
    refused = "; ".join(f"{reason} ({count})" for reason, count in row.get("refused", {}).items())
    cells = [
        row["architecture"],
        row.get("task", ""),
        row.get("class", ""),
        row["status"],
        f"{row['breaks']} / {row['llmint8 breaks']}" if "llmint8 breaks" in row else "",
        str(row.get("linears", "")),
        number(row.get("share"), ".0%"),
        number(row.get("worst"), ".2f"),
        " / ".join(
            number(row[name], ".0e") for name in ("exact error", "compiled exact error") if name in row
        ),
        number(row.get("error", row.get("checked error")), ".3f"),
        number(row.get("apart"), ".0e"),
        refused,
    ]
    return "| " + " | ".join(cells) + " |"


def within_bound(row: dict[str, Any]) -> bool:
    """No linear outside its bound, and no graph break that Inductor has not."""
    worst = max(row["worst"], row.get("compiled worst", 0))
    return worst <= 1 and row["llmint8 breaks"] <= row["breaks"]


def agrees(row: dict[str, Any]) -> bool:
    """Of one that went through step 4, as it is said above."""
    differences = (row["compiled exact error"], row["from inductor"])
    return within_bound(row) and any(each is not None and each <= EXACT for each in differences)


def agreement(rows: list[dict[str, Any]]) -> str:
    """How many compile and agree, of those that compile under Inductor."""
    judged = [row for row in rows if "compiled exact error" in row]
    only_inductor = [row["architecture"] for row in rows if row["status"] == INDUCTOR_ONLY]
    differ = [row["architecture"] for row in judged if not agrees(row)]
    total = len(judged) + len(only_inductor)
    return (
        f"Of {total} that were compiled and run with exact products, too, "
        f"{len(judged) - len(differ)} agree. They differ: {', '.join(differ) or 'none'}. "
        f"They compile under Inductor, and not under llmint8: {', '.join(only_inductor) or 'none'}."
    )


def write_table(results: dict[str, dict[str, Any]], path: Path) -> None:
    import transformers

    rows = sorted(results.values(), key=lambda row: row["architecture"])
    ran = [row for row in rows if row["status"] in ("compiled", "checked")]
    within = sum(map(within_bound, ran))
    compiled = sum(row["status"] == "compiled" for row in ran)
    exact = [row["exact error"] for row in ran if "exact error" in row]
    lines = [
        HEAD.format(transformers=transformers.__version__, torch=torch.__version__),
        f"{len(rows)} of {len(architectures())} architectures have a result here; nothing is claimed "
        "of others. A sweep may be resumed, so its rows may come from several versions of the code.",
        "",
        f"{len(ran)} ran, {within} of them with every int8 linear within its bound and no new graph "
        f"break; {sum(not row['linears'] for row in ran)} have no int8 linear. "
        f"{compiled} were compiled by Inductor (`compiled`), the others run as the rewritten "
        f"graph (`checked`). With exact products {len(exact)} were run, "
        f"{sum(error <= EXACT for error in exact)} of which differ from eager by {EXACT} at most. "
        + alike_under_dynamo(ran),
        "",
        agreement(rows),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *map(table_row, ran),
        "",
        *ranked_table(ran),
        "",
        "## Not examined further, and why",
        "",
        "| architecture | what happened |",
        "|---|---|",
    ]
    for row in rows:
        if "why" in row:
            why = row["why"].split("; ")[0].replace("|", "/")[:160]
            lines.append(f"| {row['architecture']} | {row['status']}: {why} |")
    path.write_text("\n".join(lines) + "\n")


# --- the sweep ------------------------------------------------------------------------------------


def in_process(examine: Callable[[str], dict], name: str, limit: int) -> dict[str, Any]:
    """A row from a forked process, which a time limit or a crash cannot take the sweep with it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        # Not the wall's: a machine may be busy with other things. A hang would use no time, hence both.
        signal.setitimer(signal.ITIMER_PROF, limit)
        signal.alarm(10 * limit)
        warnings.simplefilter("ignore")
        try:
            row = examine(name)
        except BaseException as error:
            row = {"architecture": name, "status": "sweep failed", "why": first_line(error)}
        with os.fdopen(write, "w") as pipe:
            json.dump(row, pipe, default=str)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text:
        return json.loads(text)
    signal_number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    late = signal_number in (signal.SIGPROF, signal.SIGALRM)
    why = f"over {limit} s" if late else f"died of signal {signal_number}"
    return {"architecture": name, "status": "died", "why": why}


@dataclass(frozen=True)
class How:
    """What every architecture is examined with.

    Attributes:
        compiles: whether step 4 is taken.
        limit: seconds of processor time for one.
        end: when to stop.
    """

    compiles: bool
    limit: int
    end: float


def sweep(names: list[str], results: Path, how: How) -> None:
    """Rows of these architectures, appended to the results."""
    for position, name in enumerate(names, 1):
        if time.time() > how.end:
            break
        row = in_process(functools.partial(examine, compiles=how.compiles), name, how.limit)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{position}/{len(names)} {name}: {row['status']} {row.get('why', '')[:150]}", flush=True)


def sweep_in_processes(names: list[str], results: Path, how: How, workers: int) -> None:
    torch.set_num_threads(1)  # forked processes and OpenMP's threads do not go together
    torch._inductor.config.compile_threads = 1
    # What every process would do first is done here, once: imports, Dynamo's tables, kernels, headers.
    examine("bert", how.compiles)
    gc.freeze()  # no collector of a forked process writes to these pages
    children = []
    for worker in range(workers):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                sweep(names[worker::workers], results, how)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        raise SystemExit(f"{sum(map(bool, codes))} of {workers} workers died: start it again to go on")


def load(results: Path) -> dict[str, dict[str, Any]]:
    """The last row of each architecture."""
    if not results.exists():
        return {}
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return {row["architecture"]: row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", help="fnmatch pattern of architectures, examined again")
    parser.add_argument("--names", type=Path, help="a file of architectures: just these, a line each")
    parser.add_argument("--again", nargs="*", default=[], help="statuses to examine again")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after")
    parser.add_argument("--limit", type=int, default=LIMIT, help="processor seconds for each")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--quick", action="store_true", help="steps 1 to 3 only, no Inductor")
    parser.add_argument("--table", action="store_true", help="write coverage.md from the results")
    arguments = parser.parse_args()
    known = load(arguments.results)
    if arguments.table:
        return write_table(known, Path(__file__).with_name("coverage.md"))
    names = arguments.names.read_text().split() if arguments.names else architectures()
    if arguments.only:
        names = [name for name in names if fnmatch.fnmatchcase(name, arguments.only)]
    else:
        names = [
            name for name in names if name not in known or known[name]["status"] in arguments.again
        ]
    how = How(not arguments.quick, arguments.limit, time.time() + arguments.seconds)
    sweep_in_processes(names, arguments.results, how, arguments.workers)


if __name__ == "__main__":
    main()
