import pytest
import torch

from glad_core import schedule
from glad_core.bundle.settings import Settings
from glad_core.engine.chain import Chain

STEPS = {"start_step": 500, "inference_steps": 5, "min_step": 150}  # 401 301 201 101 1


def chain(**changes) -> Chain:
    return Chain.of(Settings(**STEPS | changes), 1000)


def test_the_search_ends_with_the_first_step_below_min_step() -> None:
    walk = chain()
    assert walk.timesteps == schedule.timesteps(500, 5) == [401, 301, 201, 101, 1]
    assert (walk.stride, walk.start, walk.floor, walk.comparable) == (100, 500, 3, 4)
    assert (chain(min_step=0).floor, chain(min_step=0).comparable) == (None, 5)


@pytest.mark.parametrize(
    ("start_step", "noise_index", "start"), [(500, "T-1", 499), (1000, "T", 999), (1000, "T-1", 999)]
)
def test_the_start_noise_has_the_published_index_inside_the_schedule(start_step, noise_index, start) -> None:
    assert chain(start_step=start_step, noise_index=noise_index).start == start


def test_plain_ddim_and_the_fast_profile_compare_nothing() -> None:
    assert chain(delta=0).comparable == 0
    fast = chain(profile="fast", start_step=1000)
    assert (fast.timesteps, fast.start, fast.comparable, fast.floor) == ([999], 999, 0, None)


def test_delta_is_rounded_as_the_released_code_rounds_it() -> None:
    assert chain(delta=0.35).delta == torch.tensor(0.35, dtype=torch.float16).item() != 0.35
    assert chain(delta=0.35, variant="paper").delta == torch.tensor(0.35).item()
