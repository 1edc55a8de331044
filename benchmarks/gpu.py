"""The GPU day: is this package right on a GPU, and how fast is it?

    python benchmarks/gpu.py A --out DIR  # is it right? cases, tests, sanitizer, graphs
    python benchmarks/gpu.py B --out DIR  # how fast? linears, tiles, decode, a decoder, counters
    python benchmarks/gpu.py read DIR...  # writes benchmarks/gpu_measured.md, and a table of tiles
    python benchmarks/gpu.py --rehearse   # all of it on this CPU, interpreted, with tiny shapes

Each part takes less than seven minutes on one H200-class GPU and 16 cores. Every step is a process with
a limit of its own, every result a line of DIR/results.jsonl at once, and a step that is done there is
left out. It needs torch, triton, transformers, pytest and hypothesis; bitsandbytes and torchao are
compared where they are installed. ``gpu_modelled.py`` has the model for machines without a GPU.
"""

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from gpu_day.driver import Driver
from gpu_day.process import ROOT, Run, start
from gpu_day.steps import BY_NAME, PARTS


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parse(arguments)
    if given.step:
        start(Run(given.step, given.out, given.rehearse, _shard(given.shard), given.after))
        return 0
    if given.what == "read":
        from gpu_day.reader import write

        print(write(given.folders, given.to))
        return 0
    if given.rehearse:
        return _rehearse(given.out)
    return _run(Driver(given.out, resumed=given.resume), given.what)


def _run(driver: Driver, part: str) -> int:
    driver.run(part)
    faults = [line for line in driver.lines() if line.get("ok") is False]
    print("\n".join(json.dumps(line)[:400] for line in faults[:20]) or "no faults")
    print(f"{len(faults)} faults; results are in {driver.out}")
    return _faults(driver)


def _rehearse(out: Path | None) -> int:
    """Both parts side by side, then the reader, all into one folder."""
    out = out or Path(tempfile.mkdtemp(prefix="gpu-day-"))
    drivers = {part: Driver(out / part, rehearses=True) for part in PARTS}
    threads = [threading.Thread(target=driver.run, args=(part,)) for part, driver in drivers.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = out / "results.jsonl"
    results.write_text("".join((out / part / results.name).read_text() for part in PARTS))
    print(results.read_text())
    from gpu_day.reader import write

    print(write([out], out))
    return max(map(_faults, drivers.values()))


def _faults(driver: Driver) -> int:
    """1, if a step did not come to its end, or found a fault."""
    return int(any(line.get("ended", "done") != "done" for line in driver.lines()))


def _shard(text: str) -> tuple[int, int]:
    number, count = map(int, text.split("/"))
    return number, count


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="?", choices=(*PARTS, "read"), help="a part, or what reads results"
    )
    parser.add_argument("folders", nargs="*", type=Path, help="of results, for read")
    parser.add_argument("--out", type=Path, help="a folder for results")
    parser.add_argument("--resume", type=Path, help="results of before; what is done there is left out")
    parser.add_argument("--to", type=Path, default=ROOT, help="for read: a checkout to write into")
    parser.add_argument("--rehearse", action="store_true", help="run everything here, on the CPU")
    parser.add_argument("--step", choices=BY_NAME, help=argparse.SUPPRESS)
    parser.add_argument("--shard", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--after", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if not (given.step or given.what or given.rehearse):
        parser.error("say A, B, read or --rehearse")
    if given.what == "read" and not given.folders:
        parser.error("read takes a folder of results")
    if given.what in PARTS and given.out is None:
        parser.error("say --out DIR, where results go")
    return given


if __name__ == "__main__":
    sys.exit(main())
