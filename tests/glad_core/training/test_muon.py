import math

import torch

from glad_core.training.muon import Muon, Optimizers, muon_and_adamw, orthogonal, step_all


def test_orthogonal_brings_all_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((12, 40), (40, 12)):
        singular = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert singular.min() > 0.5
        assert singular.max() < 1.5


def test_an_update_is_the_orthogonal_gradient_of_the_flattened_convolution() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(36, 2, 3, 3))
    before = weight.detach().clone()
    gradient = torch.randn_like(weight)
    weight.grad = gradient.clone()
    Muon([weight], lr=0.1).step()
    # In the first step, momentum and Nesterov's look ahead only scale the gradient.
    expected = before - 0.1 * math.sqrt(36 / 18) * orthogonal(gradient.flatten(1)).reshape(weight.shape)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-5)


def test_biases_and_the_outer_layers_stay_with_adamw() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3), torch.nn.Linear(8, 2))
    muon, adamw = muon_and_adamw(model, 0.02, outer=[model[0]])
    chosen = [id(weight) for weight in muon.param_groups[0]["params"]]
    assert chosen == [id(model[1].weight), id(model[2].weight)]
    assert len(adamw.param_groups[0]["params"]) == 4
    assert adamw.param_groups[0]["lr"] == 0.002


def test_muon_reduces_a_loss() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.SiLU(), torch.nn.Conv2d(8, 1, 3))
    x = torch.randn(4, 3, 9, 9)
    optimizers = Optimizers(model, 40, outer=[model[2]])
    losses = []
    for _ in range(40):
        loss = (model(x) - x[:, :1, 2:-2, 2:-2]).square().mean()
        step_all([optimizers], loss)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.75 * losses[0]
