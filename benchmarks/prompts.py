"""What a user waits for: prompt after prompt in a new process, with compile caches empty and filled.

    python benchmarks/prompts.py                       # SmolLM2-135M in bf16, three prompts
    python benchmarks/prompts.py --layers 6,12,30,60   # compile time over the number of layers

Each contender is a process of its own, twice: "cold" has an empty compile cache, "warm" has what the
cold one left. The process loads the model, calls ``model.compile`` as a user would, and generates 60
tokens for each prompt. The prompts have different lengths. "First token" is counted from the start of
the process, and its imports and the load are in it. With ``--layers`` models of that many layers and
SmolLM2's sizes have random weights, and a cell is what the first prompt takes.
"""

import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from figures import choose, plain
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

PROMPTS = (
    "The capital of France is",
    "A compiler translates a program from one language to another. A good compiler also makes the "
    "program faster. It does so because",
    "Once upon a time there was a small village at the foot of a mountain. Every morning the baker "
    "lit the oven, the smith went to the forge, and the children ran down to the river. One day a "
    "stranger came over the bridge, and nobody knew",
)
NEW_TOKENS = 60
CACHED = ("cold", "warm")

# What ``model.compile`` is given; None: the model is not compiled.
CONTENDERS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "inductor": {"backend": "inductor"},
    "llmint8": {"backend": "llmint8"},
    "llmint8 background": {"backend": "llmint8", "options": {"background": True}},
    "llmint8 static cache": {"backend": "llmint8"},
}
GENERATE = {"llmint8 static cache": {"cache_implementation": "static"}}


@dataclass(frozen=True)
class Waits:
    """Of one process.

    Attributes:
        first_token: seconds from the start of the process.
        prompts: seconds of each ``generate``.
        graphs: that were compiled until the end of each.
        peak_bytes: the largest resident size.
    """

    first_token: float
    prompts: list[float]
    graphs: list[int]
    peak_bytes: int


def load(layers: int) -> tuple[Any, Any]:
    """SmolLM2 in bf16 and its tokenizer; random weights if a number of layers is given."""
    import torch
    from transformers import AutoModelForCausalLM

    from int8fx.bench import smollm2
    from int8fx.bench.contenders import in_bfloat16

    model, tokenizer = smollm2.load(Console(stderr=True))
    if layers:
        model.config.num_hidden_layers = layers
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(model.config)
    return in_bfloat16(model).eval().requires_grad_(False), tokenizer


def run(name: str, layers: int, count: int, started: float) -> Waits:
    """In this process."""
    from transformers.generation.streamers import BaseStreamer

    from int8fx.torch_private import compile_counts

    class FirstToken(BaseStreamer):
        """Notes when the first token after the prompt came."""

        def __init__(self) -> None:
            self.calls = 0
            self.at = 0.0

        def put(self, value: Any) -> None:
            self.calls += 1
            if self.calls == 2:
                self.at = time.time()

        def end(self) -> None:
            pass

    model, tokenizer = load(layers)
    options = CONTENDERS[name]
    if options is not None:
        model.compile(**options)
    first, prompts, graphs = FirstToken(), [], []
    for prompt in PROMPTS[:count]:
        inputs = tokenizer(prompt, return_tensors="pt")
        start = time.perf_counter()
        model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            streamer=first,
            **GENERATE.get(name, {}),
        )
        prompts.append(time.perf_counter() - start)
        graphs.append(compile_counts()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Waits(first.at - started, prompts, graphs, peak)


def in_a_process(name: str, layers: int, count: int, cache: str, threads: int) -> Waits:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": str(threads)}
    task = json.dumps([name, layers, count, time.time()])
    command = [sys.executable, __file__, "--child", task]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-4000:]}")
    return Waits(**json.loads(done.stdout.splitlines()[-1]))


def cold_and_warm(
    name: str, layers: int, count: int, threads: int, on_done: Callable[[], None]
) -> dict[str, Waits]:
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for cached in CACHED:
            found[cached] = in_a_process(name, layers, count, cache, threads)
            on_done()
    return found


def show_prompts(console: Console, found: dict[str, dict[str, Waits]]) -> None:
    count = len(next(iter(found.values()))["cold"].prompts)
    title = f"seconds; {NEW_TOKENS} new tokens for each prompt"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("contender", no_wrap=True)
    table.add_column("caches", no_wrap=True)
    prompts = (f"prompt\n{index + 1}" for index in range(count))
    for column in ("first\ntoken", *prompts, "graphs"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, runs in found.items():
        for cached, waits in runs.items():
            cells = [f"{seconds:.2f}" for seconds in (waits.first_token, *waits.prompts)]
            table.add_row(name, cached, *cells, str(waits.graphs[-1]))
    console.print(table)


def show_layers(console: Console, found: dict[int, dict[str, dict[str, Waits]]]) -> None:
    table = Table(title=f"seconds of the first prompt and {NEW_TOKENS} tokens, by layers")
    table.add_column("contender")
    table.add_column("caches")
    for layers in found:
        table.add_column(str(layers), justify="right")
    for name in next(iter(found.values())):
        for cached in CACHED:
            cells = [f"{runs[name][cached].prompts[0]:.1f}" for runs in found.values()]
            table.add_row(name, cached, *cells)
    console.print(table)


def main(
    contenders: Annotated[
        str, typer.Option(help=f"comma-separated: {', '.join(CONTENDERS)}; or all", metavar="NAMES")
    ] = "all",
    layers: Annotated[str, typer.Option(help="numbers of layers, comma-separated")] = "",
    prompts: Annotated[int, typer.Option(min=1, max=len(PROMPTS))] = len(PROMPTS),
    threads: int = 2,
    output: Annotated[Path | None, typer.Option(help="also write JSON here")] = None,
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    if child:
        print(json.dumps(dataclasses.asdict(run(*json.loads(child)))))
        return
    from int8fx.bench.timing import machine

    names = choose("contenders", contenders, CONTENDERS)
    numbers = [int(number) for number in layers.split(",")] if layers else [0]
    console = Console()
    console.print(machine())
    found: dict[int, dict[str, dict[str, Waits]]] = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(numbers) * len(names) * len(CACHED))
        for number in numbers:
            found[number] = {}
            for name in names:
                progress.update(task, description=f"{name}{f', {number} layers' if number else ''}")
                count = 1 if number else prompts
                done = cold_and_warm(name, number, count, threads, lambda: progress.advance(task))
                found[number][name] = done
    if numbers == [0]:
        show_prompts(console, found[0])
    else:
        show_layers(console, found)
    if output:
        output.write_text(json.dumps({"machine": machine(), "results": plain(found)}, indent=1))


if __name__ == "__main__":
    typer.run(main)
