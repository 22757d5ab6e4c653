"""The same networks for less: what a layer computes stays, how it is computed changes.

The layers' `forward` is replaced, weights stay where they are. Where gradients are wanted the layer computes as before.
"""

from functools import partial

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


def fold_upsampling(network: nn.Module) -> None:
    """Turn every doubling of size with a 3 x 3 convolution after it into one convolution.

    Nearest-neighbour upsampling repeats each pixel, so the nine products of an output pixel meet four different input
    pixels; weights that meet the same one can be added first. What comes of it is a transposed convolution with a
    4 x 4 kernel and stride 2: 4/9 of the multiply-accumulates, the same result but for rounding, at the border as well.
    The kernel is computed here, once: call it again if weights change.
    """
    for layer in network.modules():
        if not isinstance(layer, Upsample2D) or layer.norm is not None or not layer.interpolate:
            continue
        conv = getattr(layer, "conv", None)
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.padding == (1, 1):
            layer.forward = partial(_upsample, layer, _folded(conv.weight))


@torch.no_grad()
def _folded(weight_OI33: Tensor) -> Tensor:
    """Kernel of the transposed convolution, [I, O, 4, 4]: the sum of the 3 x 3 kernel at the four places of a pixel."""
    # A transposed convolution has its kernel the other way round. Summed in float32, as the products would be.
    kernel = weight_OI33.float().flip(2, 3).transpose(0, 1)
    placed = [F.pad(kernel, (right, 1 - right, down, 1 - down)) for right in (0, 1) for down in (0, 1)]
    folded = torch.stack(placed).sum(0).to(weight_OI33.dtype)
    last = weight_OI33.is_contiguous(memory_format=torch.channels_last)
    return folded.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _upsample(layer: Upsample2D, kernel: Tensor, x: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
    if torch.is_grad_enabled() or output_size is not None:  # a size may be asked for that is not the double
        return Upsample2D.forward(layer, x, output_size)
    return F.conv_transpose2d(x, kernel, layer.conv.bias, stride=2, padding=1)


def keep_norms_low(network: nn.Module) -> None:
    """Let norms give back the precision of what they get, under CUDA's autocast as under a CPU's.

    CUDA's autocast makes float32 of it, which the next convolution turns back: twice the memory and its traffic. Sums
    and statistics are in float32 either way.
    """
    for layer in network.modules():
        if isinstance(layer, nn.GroupNorm | nn.LayerNorm) and layer.weight is not None and layer.bias is not None:
            layer.forward = partial(_norm, layer)  # type: ignore[method-assign]


def _norm(layer: nn.GroupNorm | nn.LayerNorm, x: Tensor) -> Tensor:
    weight, bias = layer.weight.to(x.dtype), layer.bias.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(layer, nn.GroupNorm):
            return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)


def use_onednn(network: nn.Module) -> None:
    """Let oneDNN compute a network's linear layers in float32 on a CPU, as it does convolutions, when no gradient is.

    PyTorch gives them to MKL, which does without AVX-512 on CPUs that are not Intel's: half the speed. With AVX2 alone
    MKL is as fast or a little faster. Weights stay where they are.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return
    for layer in network.modules():
        if type(layer) is nn.Linear:
            layer.forward = partial(_onednn_linear, layer)  # type: ignore[method-assign]


def _onednn_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    in_float32 = x.dtype == layer.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if torch.is_grad_enabled() or not in_float32:
        return F.linear(x, layer.weight, layer.bias)
    # The operator that `torch.compile` makes of such a layer; it has no public name.
    return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
