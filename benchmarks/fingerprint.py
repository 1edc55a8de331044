"""What it costs that every call compares the float weights with what was quantised (``check_weights``).

    python benchmarks/fingerprint.py               # a decode step of SmolLM2-135M in bf16
    python benchmarks/fingerprint.py --rehearse    # a tiny model and few steps: that it runs

One compiled model decodes. In half of the rounds the check is on at one step and off at the next, and
which of a pair is first changes from pair to pair. In the others it is on in all steps of a round and
off in those of the next. The cost is the median of the differences, of pairs of steps or of medians of
rounds, with quartiles in brackets.

Behind each pair, with the processor's caches as a step leaves them, the comparison of all weights runs
by itself: first of their state alone (versions, addresses, shapes), and then with a set of samples.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from figures import plain
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from int8fx.bench import smollm2
from int8fx.bench.contenders import Contender, in_bfloat16
from int8fx.bench.timing import Timing, machine, timing_of
from int8fx.weights.identity import snapshot
from int8fx.weights.store import STORE


@dataclass(frozen=True)
class Sizes:
    prefill: int = 512
    decode: int = 64
    rounds: int = 8


@dataclass(frozen=True)
class Cost:
    """Seconds.

    Attributes:
        with_check, without: a decode step.
        pairs, blocks: by how much the check makes a step longer, of two steps and of two rounds.
        state, samples: the comparison of all weights by itself.
        weights: how many there are.
    """

    with_check: Timing
    without: Timing
    pairs: Timing
    blocks: Timing
    state: Timing
    samples: Timing
    weights: int

    def share(self, difference: Timing) -> float:
        """Of a step without the check."""
        return difference.median / self.without.median

    def __str__(self) -> str:
        return (
            f"a decode step: {_milliseconds(self.with_check)} with the check, "
            f"{_milliseconds(self.without)} without\n"
            f"the check costs, step by step: {self._cost(self.pairs)}\n"
            f"the check costs, round by round: {self._cost(self.blocks)}\n"
            f"by itself, for {self.weights} weights: state {_microseconds(self.state)}, "
            f"with a set of samples {_microseconds(self.samples)}"
        )

    def _cost(self, difference: Timing) -> str:
        return f"{_microseconds(difference)}, {self.share(difference):.2%} of a step"


def _milliseconds(timing: Timing) -> str:
    return f"{timing.median * 1e3:.3f} ms ({timing.low * 1e3:.3f} to {timing.high * 1e3:.3f})"


def _microseconds(timing: Timing) -> str:
    return f"{timing.median * 1e6:.1f} us ({timing.low * 1e6:.1f} to {timing.high * 1e6:.1f})"


def tiny() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def measure(model: PreTrainedModel, sizes: Sizes) -> Cost:
    prompt = torch.randint(model.config.vocab_size, (1, sizes.prefill))
    contender = _contender(model, sizes)
    contender.warm_up(prompt, lambda graphs: None)
    weights = [weight for weight in model.parameters() if STORE.forms(weight)]
    before = snapshot(weights)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    rounds: dict[bool, list[float]] = {True: [], False: []}
    state, samples = [], []
    for turn in range(sizes.rounds):
        tokens = contender.prefill(prompt)
        # A step fewer than there is room for: the first one after a prefill is not a usual one.
        for step in range(sizes.decode):
            for check in (True, False) if step % 2 else (False, True):
                taken, tokens = _step(contender, tokens, check)
                if step:
                    seconds[check].append(taken)
            state.append(_timed(lambda: before.matches(weights, sets=0))[0])
            samples.append(_timed(lambda: before.matches(weights, 1, first=step))[0])  # noqa: B023
        for check in (True, False) if turn % 2 else (False, True):
            tokens, block = contender.prefill(prompt), []
            for _ in range(sizes.decode):
                taken, tokens = _step(contender, tokens, check)
                block.append(taken)
            rounds[check].append(median(block[1:]))
    return Cost(
        timing_of(seconds[True]),
        timing_of(seconds[False]),
        _difference(seconds),
        _difference(rounds),
        timing_of(state),
        timing_of(samples),
        len(weights),
    )


def _difference(seconds: dict[bool, list[float]]) -> Timing:
    pairs = zip(seconds[True], seconds[False], strict=True)
    return timing_of([one - other for one, other in pairs])


def _step(contender: Contender, tokens: object, check: bool) -> tuple[float, object]:
    for swap in list(STORE.swaps.values()):
        swap.check_weights = check
    return _timed(lambda: contender.decode(tokens))


def _contender(model: PreTrainedModel, sizes: Sizes) -> Contender:
    compiled = torch.compile(model, backend="llmint8", dynamic=False)
    return Contender("llmint8", "", model, compiled, sizes.prefill + 2 * sizes.decode + 1)


def _timed(run: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def main(arguments: Sequence[str] | None = None) -> Cost:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="a tiny model: its times say nothing")
    parser.add_argument("--rounds", type=int, default=Sizes.rounds)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="also write JSON here")
    given = parser.parse_args(arguments)
    console = Console()
    if given.rehearse:
        cost = measure(tiny(), Sizes(prefill=8, decode=4, rounds=2))
    else:
        torch.set_num_threads(given.threads)
        model = in_bfloat16(smollm2.load(Console(stderr=True))[0])
        cost = measure(model.eval().requires_grad_(False), Sizes(rounds=given.rounds))
    console.print(machine(), highlight=False, soft_wrap=True)
    console.print(str(cost), highlight=False, soft_wrap=True)
    if given.output:
        found = {"machine": machine(), "cost": plain(cost), "share": cost.share(cost.blocks)}
        given.output.write_text(json.dumps(found, indent=1))
    return cost


if __name__ == "__main__":
    main()
