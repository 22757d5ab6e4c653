"""The run protocol against an adversary: many simulated lives of a run folder, and many ways of breaking it.

    python benchmarks/simulate.py [--json] [--seeds 100000]
    python benchmarks/simulate.py --replay 4711              # the trace of one seed

seeds             that were played: drivers, writers and readers interleaved, killed, paused and misinformed
lost, doubled     violations in them, by kind; `other` are all the rest
mutants           deliberately broken variants of the protocol
mutants_caught    that were noticed within 10,000 seeds

The code that runs is the project's own (pipelines/runs); `tests/simulation` has the storage, the processes and what is
checked.
"""

import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before the tests, whose folders have the same names
from simulation.mutants import MUTANTS, broken
from simulation.scenario import Violation, simulate

CHUNK = 1000  # seeds of a task
MUTANT_SEEDS = 10_000


def play(first: int, last: int) -> list[tuple[int, str]]:
    """The violations in these seeds."""
    found = []
    for seed in range(first, last):
        try:
            simulate(seed)
        except Violation as violation:
            found.append((seed, violation.kind))
    return found


def first_caught(number: int) -> int | None:
    """The first seed that notices a mutant."""
    with broken(MUTANTS[number]):
        for seed in range(MUTANT_SEEDS):
            try:
                simulate(seed)
            except Violation:
                return seed
    return None


def main(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
    seeds: Annotated[int, typer.Option(help="lives to play")] = 100_000,
    replay: Annotated[int | None, typer.Option(help="print the trace of this seed instead")] = None,
) -> None:
    """Measure and print."""
    if replay is not None:
        try:
            trace, verdict = simulate(replay, traced=True), "every image once"
        except Violation as violation:
            trace, verdict = violation.trace, str(violation)
        print(*trace, verdict, sep="\n")
        return
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        started = time.monotonic()
        starts = range(0, seeds, CHUNK)
        violations = [
            violation
            for part in pool.map(play, starts, [min(start + CHUNK, seeds) for start in starts])
            for violation in part
        ]
        seconds = time.monotonic() - started
        caught = list(pool.map(first_caught, range(len(MUTANTS))))
    figures: dict[str, Any] = {"seeds": seeds, "seconds": round(seconds, 1)}
    figures |= {kind: sum(found == kind for _, found in violations) for kind in ("lost", "doubled", "other")}
    figures |= {"mutants": len(MUTANTS), "mutants_caught": sum(seed is not None for seed in caught)}
    figures |= {"seconds_in_all": round(time.monotonic() - started, 1)}
    for seed, kind in violations[:10]:
        print(f"seed {seed}: {kind}", file=sys.stderr)
    for mutant, seed in zip(MUTANTS, caught, strict=True):
        print(f"{mutant.name}: {'not caught' if seed is None else f'seed {seed}'}", file=sys.stderr)
    print(json.dumps(figures) if as_json else "\n".join(f"{name:20} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    typer.run(main)
