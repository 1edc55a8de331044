"""Accuracy of llmint8 on SmolLM2-135M-Instruct, against the same model in fp32.

    python benchmarks/accuracy.py             # the model as it is
    python benchmarks/accuracy.py --inject    # with six outlier features in every block

Prints perplexity, KL divergence and top-1 agreement on the public-domain text that ships with the
package, for each threshold and decomposition, through the compiled backend; ``--json`` writes them
too. The first run fetches the model, as ``int8fx demo`` does.

``--inject`` multiplies six random channels of each RMSNorm's weight and divides the columns of the
linears that read them by the same factor. The function in fp32 is unchanged up to rounding (checked
first), and the linears' inputs have outlier features such as large models grow by themselves
(LLM.int8(), section 4).
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from int8fx import smollm2
from int8fx.evaluate import Accuracy, compare, sample_text, windows
from int8fx.progress import step
from int8fx.torch_private import compile_counts

WINDOW = 512
# Threshold 0 takes nothing out, so the decompositions are the same there.
SETTINGS: tuple[dict[str, Any], ...] = (
    {"threshold": 6.0, "decomposition": "column"},
    {"threshold": 6.0, "decomposition": "token"},
    {"threshold": 3.0, "decomposition": "column"},
    {"threshold": 3.0, "decomposition": "token"},
    {"threshold": 0.0},
)
CHANNELS = 6


def readers(layer: nn.Module) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Each norm weight of a Llama block, with the weights of the linears that read its output."""
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    yield layer.input_layernorm.weight, [linear.weight for linear in projections]
    yield layer.post_attention_layernorm.weight, [mlp.gate_proj.weight, mlp.up_proj.weight]


@torch.no_grad()
def inject(model: Any, factor: float, seed: int) -> list[int]:
    """Amplifies the same random channels of every norm; returns which."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randperm(model.config.hidden_size, generator=generator)[:CHANNELS]
    for layer in model.model.layers:
        for norm, linears in readers(layer):
            norm[channels] *= factor
            for weight in linears:
                weight[:, channels] /= factor
    return sorted(channels.tolist())


def inject_and_check(model: Any, factor: float, seed: int, token_ids: Tensor) -> list[int]:
    """``inject``, and a proof that fp32 does not see it.

    Raises:
        AssertionError: the logits moved by more than fp32 rounding through 30 blocks can explain.
    """
    logits = logits_of(model)
    before = logits(token_ids[None])
    channels = inject(model, factor, seed)
    moved = (logits(token_ids[None]) - before).abs().max().item()
    # Each block rounds at 2**-24 of values up to some hundreds; 1e-2 on logits of tens is what
    # that comes to, and a wrong channel or factor moves them by tens.
    allowed = 1e-2
    assert moved <= allowed, f"the injection changed the fp32 logits by {moved}; allowed {allowed}"
    print(f"injected x{factor:g} into channels {channels}; fp32 logits moved by {moved:.1e}")
    return channels


def logits_of(model: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def logits(token_ids: Tensor) -> Tensor:
        return model(input_ids=token_ids, use_cache=False).logits

    return logits


def name_of(setting: dict[str, Any]) -> str:
    decomposition = setting.get("decomposition", "none")
    return f"llmint8, {decomposition}, threshold {setting['threshold']:g}"


def judge(model: Any, token_windows: Tensor, console: Console) -> dict[str, Accuracy]:
    """The accuracy of every setting, each compiled as a user would."""
    reference = logits_of(model)
    contenders = {"fp32 as loaded": reference}
    for setting in SETTINGS:
        compiled = torch.compile(model, backend="llmint8", options=setting, dynamic=False)
        contenders[name_of(setting)] = logits_of(compiled)
    with step(console, "Compiling", len(contenders)) as update:
        for done, logits in enumerate(contenders.values(), start=1):
            logits(token_windows[:1])
            update(done)
    with step(console, "Windows", len(token_windows)) as update:
        return compare(reference, contenders, token_windows, update)


def table(title: str, accuracies: dict[str, Accuracy]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("perplexity", "mean KL", "p99 KL", "top-1"):
        table.add_column(column, justify="right")
    for name, accuracy in accuracies.items():
        table.add_row(
            name,
            f"{accuracy.perplexity:.2f}",
            f"{accuracy.mean_kl:.4f}",
            f"{accuracy.p99_kl:.3f}",
            f"{accuracy.top1:.1%}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=20, help="of 512 tokens")
    parser.add_argument("--inject", action="store_true", help="outlier features into the norms")
    parser.add_argument("--factor", type=float, default=30.0, help="of the injection")
    parser.add_argument("--seed", type=int, default=0, help="of the injected channels")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()

    console = Console(stderr=True)
    model, tokenizer = smollm2.load(console)
    token_ids = torch.tensor(tokenizer(sample_text())["input_ids"])
    token_windows = windows(token_ids, WINDOW, arguments.windows)
    title = f"SmolLM2-135M-Instruct, {arguments.windows} windows of {WINDOW} tokens"
    channels: list[int] = []
    if arguments.inject:
        channels = inject_and_check(model, arguments.factor, arguments.seed, token_windows[0])
        title += f", {CHANNELS} channels x{arguments.factor:g}"

    accuracies = judge(model, token_windows, console)
    _, breaks = compile_counts()
    Console().print(table(title, accuracies))
    print(f"graph breaks: {breaks}")
    if arguments.json:
        outcome = {
            "model": smollm2.REQUIREMENT,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "windows": arguments.windows,
            "injected": {"channels": channels, "factor": arguments.factor} if channels else None,
            "graph_breaks": breaks,
            "accuracy": {name: asdict(accuracy) for name, accuracy in accuracies.items()},
        }
        arguments.json.write_text(json.dumps(outcome, indent=2) + "\n")
    if breaks:
        raise SystemExit(f"{breaks} graph breaks; none are allowed")


if __name__ == "__main__":
    main()
