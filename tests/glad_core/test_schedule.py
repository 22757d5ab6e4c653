import pytest
import torch
from diffusers import DDIMScheduler

from glad_core import schedule
from glad_core.bundle.model import stable_diffusion_schedule

ALPHAS = schedule.alphas_cumprod()


@pytest.mark.parametrize("inference_steps", [1, 7, 25, 50])
def test_a_whole_chain_agrees_with_diffusers(inference_steps: int) -> None:
    reference = DDIMScheduler.from_config(stable_diffusion_schedule())
    reference.set_timesteps(inference_steps)
    ts = schedule.timesteps(1000, inference_steps)
    assert ts == reference.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 5, 5, generator=generator)
    stride = 1000 // inference_steps
    for t in ts:
        eps = torch.randn(x.shape, generator=generator)
        expected = reference.step(eps, t, x, eta=0.0)
        t_B = torch.full((2,), t)
        x0 = schedule.predict_x0(ALPHAS, x, eps, t_B)
        x_prev = schedule.ddim_step(ALPHAS, x0, eps, t_B - stride)
        torch.testing.assert_close(x0, expected.pred_original_sample, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(x_prev, expected.prev_sample, rtol=1e-6, atol=1e-6)
        x = x_prev


def test_each_sample_has_its_own_timestep() -> None:
    x, eps = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    t = torch.tensor([1, 500, 999])
    reference = DDIMScheduler.from_config(stable_diffusion_schedule())
    noisy = schedule.add_noise(ALPHAS, x, eps, t)
    torch.testing.assert_close(noisy, reference.add_noise(x, eps, t), rtol=1e-6, atol=1e-6)
    alone = torch.cat([schedule.add_noise(ALPHAS, x[i : i + 1], eps[i : i + 1], t[i : i + 1]) for i in range(3)])
    assert torch.equal(noisy, alone)
    torch.testing.assert_close(schedule.predict_x0(ALPHAS, noisy, eps, t), x, rtol=0, atol=1e-4)


def test_the_walk_is_spaced_over_the_start_step() -> None:
    assert schedule.timesteps(750, 25)[:2] == [721, 691]
    assert schedule.timesteps(437, 14)[-1] == 1
