"""From a day's lines to a page, a table of tiles that kernels load, and a verdict on the model."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gpu_day import acceptance, comparison, lines, tables
from gpu_day.lines import Line, of_step
from gpu_day.steps import STEPS

REHEARSED = "a rehearsal on a CPU"
PAGE = Path("benchmarks") / "gpu_measured.md"
TABLES = Path("kernels") / "gpu" / "tables"


def write(folders: Sequence[Path], to: Path) -> str:
    """Writes what folders of results give into a checkout, later ones before earlier; says which files.

    Raises:
        ValueError: nobody measured anything there, or it is a rehearsal, which is for no checkout.
    """
    from int8fx.kernels.gpu.tile_tables import file_name

    found = lines.latest(line for folder in folders for line in lines.read(folder))
    machine = _machine(found)
    if machine["device"] == REHEARSED and (to / "pyproject.toml").exists():
        raise ValueError(f"this is a rehearsal, and {to} a checkout: name another folder with --to")
    table = tables.measured(found)
    written = {to / PAGE: page(found)}
    if table.products or table.decodes:
        written[to / TABLES / file_name(table.device)] = table.to_json()
    for path, text in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return "\n".join(f"written: {path}" for path in written)


def _machine(found: list[Line]) -> Line:
    machine = next(of_step(found, "machine"), None)
    if machine is None:
        raise ValueError("no line of the step 'machine': nobody knows of which GPU the others are")
    return machine


def page(found: list[Line], model: comparison.Model | None = None) -> str:
    """The whole page.

    Args:
        model: what the tiles are modelled by; None, ``gpu_model.py`` with the GPU's data sheet.
    """
    machine = _machine(found)
    sections = (_head(machine), _steps(found), acceptance.page(found), _limits(found))
    times = (_linears(found), _tiles(found), _decodes(found), _decoder(found), _counters(found))
    return "\n".join(part for part in (*sections, *times, _model(found, machine, model)) if part)


def _head(machine: Line) -> str:
    rehearsed = machine["device"] == REHEARSED
    title = "rehearsed, not measured" if rehearsed else f"measured on {machine['device']}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    state = ", ".join(f"{name} {value}" for name, value in machine["state"].items()) or "not known"
    return (
        f"# LLM.int8() on a GPU: {title}\n\nWritten by `python benchmarks/gpu.py read`. {versions}; "
        f"{machine['processors']} multiprocessors, {machine['arch']}. When it began: {state}.\n"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """In Markdown; a number with the digits that matter, and nothing for what is missing."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        return "" if value is None else str(value)

    body = [list(map(cell, row)) for row in rows]
    lines_ = [list(header), ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines_) + "\n" if body else ""


def _titled(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _steps(found: list[Line]) -> str:
    ends = {line["step"]: line for line in found if "ended" in line}
    rows = []
    for step in STEPS:
        end = ends.get(step.name, {})
        faults = sum(line.get("ok") is False for line in of_step(found, step.name))
        said = sum(1 for _ in of_step(found, step.name))
        rows.append((step.name, end.get("ended", "not run"), end.get("seconds"), said, faults or None))
    faults = [line for line in found if line.get("ok") is False]
    told = "".join(f"\n    {json.dumps(line)[:400]}" for line in faults[:20])
    return _titled(
        "Steps",
        table(("", "ended", "seconds", "lines", "faults"), rows) + (told + "\n" if told else ""),
    )


def _limits(found: list[Line]) -> str:
    kinds = ("bf16", "fp16", "int8")
    rows = [
        (f"{line['M']} x {line['N']} x {line['K']}", *map(line["TOPS"].get, kinds))
        for line in of_step(found, "limits")
        if "TOPS" in line
    ]
    copies = [line["copy_TB_s"] for line in of_step(found, "limits") if "copy_TB_s" in line]
    copied = f"A copy moved {copies[0]} TB/s." if copies else ""
    text = table(("TOPS of torch's products", *kinds), rows)
    return _titled("What the GPU gives at most", f"{copied}\n\n{text}" if text else "")


def _timed(found: list[Line], step: str) -> list[tuple[Any, ...]]:
    merged: dict[tuple[str, int], dict[str, float]] = {}
    for line in of_step(found, step):
        if "kind" not in line and "us" in line:
            merged.setdefault((line["layer"], line["M"]), {}).update(line["us"])
    return [(*key, us) for key, us in merged.items()]


def _contenders(found: list[Line], step: str, title: str) -> str:
    timed = _timed(found, step)
    who = list(dict.fromkeys(name for *_, us in timed for name in us))
    rows = [(layer, M, *(us.get(name) for name in who)) for layer, M, us in timed]
    return _titled(title, table(("linears", "M", *who), rows))


def _linears(found: list[Line]) -> str:
    return _contenders(found, "linears", "A norm and the linears that read it, microseconds")


def _decodes(found: list[Line]) -> str:
    return _contenders(
        found, "decodes", "The same of few rows, ours compiled with the norm, microseconds"
    )


def _tiles(found: list[Line]) -> str:
    """The fastest tile, and the built-in guess, which is the last that was measured."""
    rows = []
    for line in (*of_step(found, "tiles"), *of_step(found, "decodes")):
        best = tables.fastest(line["us"])
        if best is not None:
            guess = [us for name, us in line["us"].items() if name.startswith("{")][-1]
            tile = ", ".join(f"{k} {v}" for k, v in json.loads(best[0]).items())
            rows.append((line["layer"], line["M"], line.get("kind"), tile, best[1], guess))
    header = ("linears", "M", "decode", "fastest tile", "us", "the built-in guess, us")
    return _titled("Tiles", table(header, rows))


def _decoder(found: list[Line]) -> str:
    timed = [line for line in of_step(found, "decoder") if "us" in line]
    phases = list(dict.fromkeys(phase for line in timed for phase in line["us"]))
    rows = [(each["who"], *map(each["us"].get, phases), each["peak_GiB"]) for each in timed]
    return _titled("A decoder, microseconds", table(("", *phases, "peak, GiB"), rows))


def _counters(found: list[Line]) -> str:
    launches = [line for line in of_step(found, "counters") if "kernel" in line]
    names = list(dict.fromkeys(name for line in launches for name in line["counters"]))
    rows = [(line["kernel"], *map(line["counters"].get, names)) for line in launches]
    return _titled("Counters", table(("kernel", *names), rows))


def _model(found: list[Line], machine: Line, model: comparison.Model | None) -> str:
    title = "The model against the measurement"
    name = "the one that was given"
    if model is None:
        gpu = comparison.sheet(machine["device"], machine["arch"])
        if gpu is None:
            return _titled(title, f"`gpu_model.py` has no data sheet for {machine['arch']}.\n")
        model, name = comparison.cost_model(gpu), gpu.name
    rows = [
        (each.what, each.tiles, each.agreement, f"{100 * each.lost:.0f} %")
        for each in comparison.compared(found, model)
    ]
    text = table(("", "tiles", "rank correlation", "lost by going by the model"), rows)
    return _titled(title, f"Data sheet: {name}.\n\n{text}" if text else "")
