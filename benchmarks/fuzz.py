"""Random graphs against float64, many of them: ``python benchmarks/fuzz.py --graphs 2000``.

What is drawn is in ``int8fx/testing/random_graphs.py``, what is checked in ``fuzz.py`` there. A graph
that fails is shrunk by hypothesis and printed; it becomes an entry of ``COUNTEREXAMPLES`` in
``tests/test_fuzz.py``.
"""

import argparse
import time

from hypothesis import HealthCheck, Phase, given, seed, settings

from int8fx.testing.fuzz import check
from int8fx.testing.random_graphs import programs


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
