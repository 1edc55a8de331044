"""Random graphs against float64, many of them: ``python benchmarks/fuzz.py --graphs 2000``.

What is drawn and what is checked is in ``tests/random_graphs.py`` and ``tests/test_fuzz.py``. A graph
that fails is shrunk by hypothesis and printed; it becomes an entry of ``COUNTEREXAMPLES`` there.
"""

import argparse
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from test_fuzz import check  # noqa: E402

from int8fx.testing.random_graphs import programs  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graphs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inductor", action="store_true", help="compile each with Inductor as well")
    arguments = parser.parse_args()
    ran = linears = 0
    worst = 0.0

    @seed(arguments.seed)
    @settings(
        max_examples=arguments.graphs,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(programs())
    def run(program: dict) -> None:
        nonlocal ran, linears, worst
        seen = check(program, arguments.inductor)
        ran, linears, worst = ran + 1, linears + seen.linears, max(worst, seen.worst)

    started = time.time()
    run()
    print(
        f"{ran} graphs, {linears} int8 linears, none outside its bound (nearest {worst:.2f} of it), "
        f"seed {arguments.seed}, {time.time() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
