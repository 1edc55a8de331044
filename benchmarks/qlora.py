"""QLoRA of SmolLM2-135M: LoRA on NF4 weights, by int8fx compiled and by bitsandbytes, step by step.

    python benchmarks/qlora.py                     # the table and the figure
    python benchmarks/qlora.py --steps 4 --length 32

Both quantise the same weights in bf16 to double-quantised NF4 in blocks of 64, begin with the same
adapters, and see the same batches of the sample text in the same order. So their losses differ by the
rounding of their kernels, and by how each scales its absmax. Every step is timed: forward, backward and
the optimizer's. Steps of the two take turns, so that what else the machine does meets both.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import int8fx
from int8fx.bench import smollm2, texts
from int8fx.bench.timing import machine, timing_of

BLOCK = 64  # both packages' default
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM = 3  # steps whose time does not count: the first compile, and the optimizer's state


@dataclass
class Run:
    """One model in training.

    Attributes:
        step: trains on a batch of token ids ``[B, T]``; the loss before.
    """

    name: str
    step: Callable[[Tensor], float]
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def train(self, token_ids: Tensor) -> None:
        began = time.perf_counter()
        self.losses.append(self.step(token_ids))
        self.seconds.append(time.perf_counter() - began)

    @property
    def median(self) -> float:
        """Seconds of a step, behind those that warm up."""
        return timing_of(self.seconds[WARM:]).median


def by_int8fx(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return int8fx.quantize_(model, scheme="nf4", blocksize=BLOCK, double_quant=True)


def by_bitsandbytes(folder: Path) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options = {"dtype": torch.bfloat16, "device_map": "cpu", "quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def adapted(model: Any, rank: int) -> Any:
    torch.manual_seed(0)  # the adapters are the same
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ADAPTED))


def run_of(name: str, model: Any, learning_rate: float) -> Run:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)

    def step(token_ids: Tensor) -> float:
        loss = model(input_ids=token_ids, labels=token_ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return Run(name, step)


def batches(token_ids: Tensor, steps: int, batch: int, length: int) -> Iterator[Tensor]:
    """``[batch, length]`` each, of windows in an order that a seed gives; a text is read again."""
    windows = token_ids[: len(token_ids) // length * length].view(-1, length)
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch:
            order += torch.randperm(len(windows), generator=generator).tolist()
        chosen, order = order[:batch], order[batch:]
        yield windows[chosen]


def main(
    steps: Annotated[int, typer.Option(min=WARM + 2)] = 40,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a sequence.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 2,
    rank: Annotated[int, typer.Option(min=1)] = 8,
    learning_rate: float = 5e-4,
    figure: Annotated[Path | None, typer.Option(help="Where to draw the losses.")] = None,
) -> None:
    progress = Console(stderr=True)
    folder = smollm2.local_copy(progress)
    _, tokenizer = smollm2.load(progress)
    token_ids = torch.tensor(tokenizer(texts.read(None))["input_ids"])
    ours = adapted(by_int8fx(folder), rank)
    ours.compile(backend="llmint8")
    theirs = adapted(by_bitsandbytes(folder), rank)
    runs = [
        run_of("int8fx, compiled", ours, learning_rate),
        run_of("bitsandbytes, eager", theirs, learning_rate),
    ]
    for done, chosen in enumerate(batches(token_ids, steps, batch, length), 1):
        for run in runs:
            run.train(chosen)
        progress.print(f"step {done}: " + ", ".join(f"{run.losses[-1]:.4f}" for run in runs))
    report(runs, Console())
    if figure is not None:
        draw(runs, figure)


def report(runs: list[Run], console: Console) -> None:
    ours, theirs = runs
    table = Table("step", *(run.name for run in runs), "difference")
    for step, (mine, other) in enumerate(zip(ours.losses, theirs.losses, strict=True), 1):
        table.add_row(str(step), f"{mine:.4f}", f"{other:.4f}", f"{mine - other:+.4f}")
    console.print(table)
    ratio = theirs.median / ours.median
    console.print(
        f"{machine()}\nA step: {ours.name} {ours.median:.3f} s, {theirs.name} {theirs.median:.3f} s, "
        f"{ratio:.2f}x of the speed"
    )


def draw(runs: list[Run], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    for run, style in zip(runs, ("-", "--"), strict=True):
        axes.plot(range(1, len(run.losses) + 1), run.losses, style, label=run.name)
    axes.set(xlabel="step", ylabel="loss")
    axes.set_title("LoRA on NF4, SmolLM2-135M", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    typer.run(main)
