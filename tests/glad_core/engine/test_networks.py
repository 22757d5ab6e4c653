"""Faster layers: the same results, and gradients as before."""

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch.utils.flop_counter import FlopCounterMode

from glad_core.engine.networks import fold_upsampling, keep_norms_low, use_onednn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_upsampling_gives_the_same_at_every_size(dtype):
    torch.manual_seed(0)
    layer = Upsample2D(6, use_conv=True, out_channels=10).to(dtype)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    inputs = [
        torch.randn(rows, 6, height, width, dtype=dtype) for rows, height, width in ((3, 5, 7), (1, 1, 1), (2, 8, 4))
    ]
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    with torch.inference_mode():
        expected = [(layer(x), layer(x, (2 * x.shape[2] - 1, 9))) for x in inputs]
        fold_upsampling(layer)
        for x, (doubled, sized) in zip(inputs, expected, strict=True):
            torch.testing.assert_close(layer(x), doubled, atol=tolerance, rtol=tolerance)
            # A size that is not the double is computed as before.
            torch.testing.assert_close(layer(x, (2 * x.shape[2] - 1, 9)), sized, atol=0, rtol=0)
    torch.testing.assert_close(dict(layer.state_dict()), state, atol=0, rtol=0)


def test_folded_upsampling_makes_four_ninths_of_the_products():
    layer, x, flops = Upsample2D(6, use_conv=True), torch.randn(2, 6, 8, 8), []
    for _ in range(2):
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            layer(x)
        flops.append(counter.get_total_flops())
        fold_upsampling(layer)
    assert flops[1] * 9 == flops[0] * 4


def test_folded_upsampling_can_still_be_trained_and_follows_weights_when_folded_again():
    layer, x = Upsample2D(4, use_conv=True), torch.randn(1, 4, 3, 3)
    fold_upsampling(layer)
    layer(x).sum().backward()
    assert layer.conv.weight.grad is not None
    with torch.no_grad():
        layer.conv.weight.mul_(2)
    fold_upsampling(layer)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), Upsample2D.forward(layer, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [torch.nn.GroupNorm(2, 6), torch.nn.LayerNorm((6, 5, 7))])
def test_norms_give_the_same_in_the_precision_of_their_input(layer):
    torch.manual_seed(0)
    x = torch.randn(3, 6, 5, 7)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    expected = layer(x).detach()
    keep_norms_low(layer)
    torch.testing.assert_close(layer(x), expected, atol=0, rtol=0)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            low = layer(x.to(dtype))
        assert low.dtype == dtype
        torch.testing.assert_close(low.float(), expected, atol=0.1, rtol=0.02)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_linear_layers_through_onednn_give_the_same_and_can_still_be_trained():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(24, 40), torch.randn(3, 7, 24)
    expected = layer(x).detach()
    use_onednn(layer)
    with torch.inference_mode():
        for rows, plain in ((x, expected), (x[:, ::2], expected[:, ::2]), (x[0, 0], expected[0, 0])):
            torch.testing.assert_close(layer(rows), plain, atol=1e-5, rtol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    layer(x).sum().backward()
    assert layer.weight.grad is not None
