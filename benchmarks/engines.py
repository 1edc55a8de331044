"""int8fx beside other inference engines on a CPU: llama.cpp, ONNX Runtime, OpenVINO and CTranslate2.

    python benchmarks/engines.py             # makes what is missing, and runs all
    python benchmarks/engines.py MODEL --engines "llama.cpp Q8_0,int8fx llm.int8" --rounds 3

``MODEL`` is a folder of a Llama of transformers; by default SmolLM2-135M-Instruct. Each engine reads
the same weights from a form of its own, in an environment and a process of its own (``engines/``). One
driver gives turns in rounds, so that one process runs at a time: a prefill of 512 tokens, and 64 greedy
decode steps behind 64 tokens and behind 1,024. Medians with quartiles. All have two threads.

First token: from the start of a process to its answer to a prompt of 16 tokens, ``cold`` with an empty
compile cache and ``warm`` behind that. Peak: the largest resident size of that process. KL: mean over
windows of 512 tokens of *Emma* of the divergence from the same weights in fp32.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy
import typer
from figures import choose, plain
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from int8fx.bench import smollm2
from int8fx.bench.texts import load_with_tokens
from int8fx.bench.timing import Timing, machine, timing_of

HERE = Path(__file__).parent / "engines"
sys.path.insert(0, str(HERE))
from prepare import CAPACITY, ENGINES, converted, environment, version  # noqa: E402  beside this script

PREFILL, STEPS = 512, 64
CONTEXTS = (64, 1024)
SHORT_PROMPT = 16
FP32 = "fp32"

TORCH: dict[str, dict[str, Any]] = {
    "Inductor bf16": {"dtype": "bfloat16", "backend": "inductor"},
    "int8fx llm.int8": {"dtype": "bfloat16", "backend": "llmint8"},
    "int8fx int8-rotated": {
        "dtype": "bfloat16",
        "backend": "llmint8",
        "options": {"scheme": "int8-rotated"},
        "calibrate": True,
    },
}


@dataclass
class Worker:
    """A contender's process."""

    process: subprocess.Popen[str]
    peak_bytes: int = 0

    def ask(self, method: str, *arguments: Any) -> float:
        """Seconds of one call.

        Raises:
            RuntimeError: the process ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([method, *arguments]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")
        answer = json.loads(line)
        self.peak_bytes = answer["peak_bytes"]
        return answer["seconds"]


@contextmanager
def started(command: Sequence[str], log: Path, **environment: str) -> Iterator[Worker]:
    pipe = subprocess.PIPE
    with (
        log.open("a") as stderr,
        subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=stderr,
            text=True,
            env={**os.environ, **environment},
        ) as process,
    ):
        yield Worker(process)
        assert process.stdin is not None
        process.stdin.close()


@dataclass
class Result:
    """What is known of one contender; seconds."""

    version: str
    prefill: list[float] = field(default_factory=list)
    decode: dict[int, list[float]] = field(default_factory=lambda: {n: [] for n in CONTEXTS})
    cold: float = math.nan
    warm: float = math.nan
    peak_bytes: int = 0
    kl: float = math.nan


def commands(model: Path, environments: Path, names: Sequence[str]) -> dict[str, tuple[list[str], str]]:
    """How each contender's process is started, and its version; makes what is missing."""
    import torch

    import int8fx

    forms = environments / "forms"
    forms.mkdir(parents=True, exist_ok=True)
    found: dict[str, tuple[list[str], str]] = {}
    for name in names:
        if name in TORCH:
            how = json.dumps(TORCH[name])
            command = [sys.executable, str(HERE / "int8fx_worker.py"), str(model), str(CAPACITY), how]
            own = f"{int8fx.__version__}, " if name.startswith("int8fx") else ""
            found[name] = command, f"{own}torch {torch.__version__}"
            continue
        engine = ENGINES[name]
        python = environment(engine, environments)
        form = converted(engine, python, model, forms)
        command = [str(python), str(HERE / engine.worker), str(form), str(CAPACITY)]
        found[name] = command, version(python, *engine.packages[:1])
    return found


def first_tokens(command: list[str], result: Result, tokens: list[int], scratch: Path) -> None:
    """Two processes, the first with an empty compile cache."""
    scratch.mkdir()
    cache = {
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
    }
    for which in ("cold", "warm"):
        start = time.perf_counter()
        with started(command, scratch / "log", **cache) as worker:
            worker.ask("prefill", tokens[:SHORT_PROMPT])
            setattr(result, which, time.perf_counter() - start)
            worker.ask("decode", 1)
            result.peak_bytes = worker.peak_bytes


def turns(
    workers: dict[str, Worker],
    results: dict[str, Result],
    tokens: list[int],
    rounds: int,
    tick: Callable[[], None],
) -> None:
    for round_ in range(rounds + 1):  # the first warms up
        for name, worker in workers.items():
            seconds = worker.ask("prefill", tokens[:PREFILL])
            if round_:
                results[name].prefill.append(seconds)
            for context in CONTEXTS:
                worker.ask("prefill", tokens[:context])
                seconds = worker.ask("decode", STEPS)
                if round_:
                    results[name].decode[context].append(seconds)
        tick()


def divergences(
    workers: dict[str, Worker], results: dict[str, Result], windows: list[list[int]], scratch: Path
) -> None:
    """Mean KL of each contender from the one in fp32."""
    judged = [name for name in results if name not in ENGINES or ENGINES[name].has_logits]
    sums = dict.fromkeys(judged, 0.0)
    for window in windows:
        expected = _log_softmax(_logits(workers[FP32], window, scratch))
        for name in judged:
            found = _log_softmax(_logits(workers[name], window, scratch))
            sums[name] += float((numpy.exp(expected) * (expected - found)).sum(-1).mean())
    for name in judged:
        results[name].kl = sums[name] / len(windows)


def _logits(worker: Worker, window: list[int], scratch: Path) -> numpy.ndarray:
    path = scratch / "logits.npy"
    worker.ask("logits", window, str(path))
    return numpy.load(path).astype(numpy.float64)


def _log_softmax(logits: numpy.ndarray) -> numpy.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - numpy.log(numpy.exp(shifted).sum(-1, keepdims=True))


def show(console: Console, results: dict[str, Result]) -> None:
    table = Table(
        title=f"seconds; {machine()}",
        caption="decode: 64 steps behind so many tokens; quartiles in brackets",
    )
    table.add_column("contender")
    heads = (
        "prefill 512",
        *(f"decode {n}" for n in CONTEXTS),
        "first, cold",
        "warm",
        "peak, MiB",
        "mean KL",
    )
    for head in heads:
        table.add_column(head, justify="right")
    for name, result in results.items():
        times = [_cell(timing_of(seconds)) for seconds in (result.prefill, *result.decode.values())]
        first = [f"{seconds:.1f}" for seconds in (result.cold, result.warm)]
        table.add_row(
            f"{name} ({result.version})",
            *times,
            *first,
            f"{result.peak_bytes / 2**20:.0f}",
            f"{result.kl:.4f}",
        )
    console.print(table)


def _cell(timing: Timing) -> str:
    return f"{timing.median:.3f} ({timing.low:.3f}-{timing.high:.3f})"


def run(
    found: dict[str, tuple[list[str], str]],
    fp32: list[str],
    tokens: list[int],
    rounds: int,
    windows: int,
    start_up: bool,
    progress: Progress,
) -> dict[str, Result]:
    results = {name: Result(version) for name, (_, version) in found.items()}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if start_up:
            for name, (command, _) in progress.track(found.items(), description="new processes"):
                first_tokens(command, results[name], tokens, scratch / name)
        all_commands = {name: command for name, (command, _) in found.items()}
        if windows:
            all_commands[FP32] = fp32
        workers = {
            name: stack.enter_context(started(command, scratch / "log"))
            for name, command in all_commands.items()
        }
        judged = {name: workers[name] for name in results}
        bar = progress.add_task("rounds", total=rounds + 1)
        turns(judged, results, tokens, rounds, lambda: progress.advance(bar))
        if windows:
            texts = [tokens[PREFILL * n : PREFILL * (n + 1)] for n in range(windows)]
            divergences(workers, results, texts, scratch)
    return results


def main(
    model: Annotated[str | None, typer.Argument(help="a Llama's folder; SmolLM2-135M if none")] = None,
    environments: Annotated[
        Path, typer.Option(help="a folder of the engines' environments; what is missing is made")
    ] = Path("engine-environments"),
    engines: Annotated[str, typer.Option(help="comma-separated names, or all")] = "all",
    rounds: Annotated[int, typer.Option(min=2)] = 9,
    windows: Annotated[int, typer.Option(help="of 512 tokens, for the KL; 0: none")] = 3,
    start_up: Annotated[bool, typer.Option(help="time new processes, too")] = True,
    output: Annotated[Path | None, typer.Option(help="also write JSON here")] = None,
) -> None:
    console, stderr = Console(), Console(stderr=True)
    names = choose("engines", engines, {**TORCH, **ENGINES})
    folder = smollm2.local_copy(stderr) if model is None else Path(model)
    tokens = load_with_tokens(model, None, stderr)[1].tolist()
    with stderr.status("making the engines' environments and forms"):
        found = commands(folder, environments.absolute(), names)
    how = json.dumps({"dtype": "float32"})
    fp32 = [sys.executable, str(HERE / "int8fx_worker.py"), str(folder), str(CAPACITY), how]
    with Progress(console=stderr) as progress:
        results = run(found, fp32, tokens, rounds, windows, start_up, progress)
    show(console, results)
    if output is not None:
        output.write_text(json.dumps(plain(results), indent=1))


if __name__ == "__main__":
    typer.run(main)
