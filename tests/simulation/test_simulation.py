"""The run protocol against an adversary, `benchmarks/simulate.py` in small."""

import inspect

import pytest
from simulation.mutants import MUTANTS, broken
from simulation.scenario import Violation, simulate
from simulation.world import SimulatedStorage

from cluster.storage import Storage

SEEDS = 2000
MUTANT_SEEDS = 1000


@pytest.mark.parametrize("part", range(4))
def test_nothing_is_lost_or_doubled_whatever_happens(part):
    for seed in range(part * SEEDS // 4, (part + 1) * SEEDS // 4):
        simulate(seed)


# The benchmark runs all of them; these are caught early, so they cost little.
@pytest.mark.parametrize("name", [
    "plans replace each other",
    "another command resumes a foreign run",
    "the fence does not look",
    "an overwritten run shares its commits with the new one",
    "writers write straight into results/",
    "whoever comes second publishes its own files",
    "a shard is committed before its last piece",
    "a missing file counts as published",
    "staging is swept when a run is resumed",
    "the last record holds",
    "results go before run.json",
])  # fmt: skip
def test_the_simulator_notices_a_broken_protocol(name):
    (mutant,) = [mutant for mutant in MUTANTS if mutant.name == name]
    with broken(mutant):
        assert any(fails(seed) for seed in range(MUTANT_SEEDS))


def fails(seed: int) -> bool:
    try:
        simulate(seed)
    except Violation:
        return True
    return False


def test_a_seed_gives_the_same_history_every_time_and_its_trace_replays():
    assert simulate(7, traced=True) == simulate(7, traced=True)
    assert any("create /out/plan.json" in line for line in simulate(7, traced=True))
    (mutant,) = [mutant for mutant in MUTANTS if mutant.name == "nothing is swept"]
    with broken(mutant):
        seed = next(filter(fails, range(MUTANT_SEEDS)))
        traces = []
        for _ in range(2):
            with pytest.raises(Violation) as caught:
                simulate(seed, traced=True)
            traces.append(caught.value.trace)
    assert traces[0] == traces[1] != []


def test_the_simulated_storage_has_the_face_of_the_real_one():
    for name, method in inspect.getmembers(SimulatedStorage, inspect.isfunction):
        if not name.startswith("_"):
            ours = list(inspect.signature(method).parameters)
            real = inspect.signature(getattr(Storage, name)).parameters
            assert ours == list(real)[: len(ours)], name
            assert all(real[more].default is not inspect.Parameter.empty for more in list(real)[len(ours) :]), name
