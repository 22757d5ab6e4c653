"""Faster networks with the same results: every layer keeps what it computes and changes how.

Only the layers' ``forward`` is replaced; the weights stay in place. With gradients a layer computes as before.
"""

from functools import partial

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from glad_core.bundle.model import Model


def prepare_networks(model: Model, compiled: bool) -> None:
    """Make a model's networks fast on its device, in place.

    Args:
        model: with its final weights.
        compiled: hand the networks to `torch.compile`, which compiles each batch size at its first call.
    """
    on_cpu = model.device.type == "cpu"
    for network in (model.unet, model.vae):
        # cuDNN is a tenth faster without channels-last (H200, Stable Diffusion sizes, bf16 and float32; docs/speed.md).
        if on_cpu:
            network.to(memory_format=torch.channels_last)
        elif model.autocast is not None:
            keep_norms_low(network)
        fold_upsampling(network)
    if compiled:
        compile_networks(model)
    elif on_cpu and torch.backends.cpu.get_cpu_capability() == "AVX512":
        for network in (model.unet, model.vae, model.features, model.final_features):
            use_onednn(network)


def compile_networks(model: Model) -> None:
    """Hand the networks to `torch.compile`, one graph for each batch size."""
    torch._dynamo.config.recompile_limit = 64  # sizes of one function; beyond it torch falls back without a word
    backbones = {id(backbone): backbone for backbone in (model.features, model.final_features)}.values()
    rows = [row for backbone in backbones for row in backbone.net.children()]
    blocks = [block for row in rows if isinstance(row, nn.Sequential | nn.ModuleList) for block in row]
    for network in (model.unet, model.vae.encoder, model.vae.decoder, *blocks):
        network.compile(dynamic=False)


def fold_upsampling(network: nn.Module) -> None:
    """Merge every doubling of size and the 3 x 3 convolution after it into one convolution.

    Nearest-neighbour upsampling repeats each pixel, so the nine products of an output pixel use four different input
    pixels, and weights of the same input pixel can be added beforehand. The merged layer is a transposed convolution
    with a 4 x 4 kernel and stride 2: 4/9 of the multiply-accumulates, the same result up to rounding, also at the
    border. The kernel is computed once, here: call this again if the weights change.
    """
    for layer in network.modules():
        if not isinstance(layer, Upsample2D) or layer.norm is not None or not layer.interpolate:
            continue
        conv = getattr(layer, "conv", None)
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.padding == (1, 1):
            layer.forward = partial(_upsample, layer, _folded(conv.weight))


@torch.no_grad()
def _folded(weight_OI33: Tensor) -> Tensor:
    """Kernel of the transposed convolution, [I, O, 4, 4]: the 3 x 3 kernel summed over the four copies of a pixel."""
    # A transposed convolution uses its kernel flipped. Summed in float32, as the products would be.
    kernel = weight_OI33.float().flip(2, 3).transpose(0, 1)
    shifted = [F.pad(kernel, (right, 1 - right, down, 1 - down)) for right in (0, 1) for down in (0, 1)]
    folded = torch.stack(shifted).sum(0).to(weight_OI33.dtype)
    channels_last = weight_OI33.is_contiguous(memory_format=torch.channels_last)
    return folded.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _upsample(layer: Upsample2D, kernel: Tensor, x: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
    if torch.is_grad_enabled() or output_size is not None:  # the size may differ from the double
        return Upsample2D.forward(layer, x, output_size)
    return F.conv_transpose2d(x, kernel, layer.conv.bias, stride=2, padding=1)


def keep_norms_low(network: nn.Module) -> None:
    """Let norms return the precision of their input under CUDA's autocast too, as they do under a CPU's.

    CUDA's autocast returns float32, which the next convolution converts back: twice the memory and its traffic. Sums
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
    """Let oneDNN compute a network's float32 linear layers on a CPU, as it does convolutions; not with gradients.

    PyTorch uses MKL for them, which does not use AVX-512 on CPUs of other makers than Intel: half the speed. With AVX2
    alone MKL is as fast or a little faster.
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
    # The operator that `torch.compile` uses for such a layer; it has no public name.
    return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
