"""GPU memory that fine-tuning Stable Diffusion v1-4's UNet needs, computed from its shapes without GPU or weights.

    python benchmarks/training_memory.py [--json]

Weights, gradients and optimiser states follow from the parameter count. Activations are the tensors that autograd keeps
for one image of 512 x 512 (latents 64 x 64), counted on PyTorch's meta device with 16-bit activations, as under
autocast. With gradient checkpointing they are the tensors kept between blocks plus those of the largest block.
Attention is counted as the memory-efficient kernels keep it (their inputs and output, not the N x N matrix). Allocator
overhead is not counted.
"""

from __future__ import annotations

import json
from typing import Annotated

import torch
import typer
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import Tensor

GB = 1e9
FROZEN = 0.084 + 0.086  # billion parameters of the VAE and the ViT, kept in float32 beside the UNet


def kept_bytes(unet: UNet2DConditionModel) -> tuple[int, int]:
    """Bytes that autograd keeps for one image, and those of its largest down, mid or up block."""
    seen: dict[int, Tensor] = {}
    parameters = {id(p.untyped_storage()) for p in unet.parameters()}
    blocks: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        is_matrix = tensor.ndim == 4 and tensor.shape[-1] == tensor.shape[-2] >= 256  # softmax of the plain attention
        if storage._cdata not in seen and id(storage) not in parameters and not is_matrix and not tensor.is_leaf:
            seen[storage._cdata] = tensor
        return tensor

    def total() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())

    started: list[int] = []
    for block in [*unet.down_blocks, unet.mid_block, *unet.up_blocks]:
        block.register_forward_pre_hook(lambda *_: started.append(total()))
        block.register_forward_hook(lambda *_: blocks.append(total() - started[-1]))
    latents = torch.zeros(1, 4, 64, 64, device="meta", dtype=torch.bfloat16)
    prompt = torch.zeros(1, 77, 768, device="meta", dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unet(latents, torch.zeros(1, device="meta"), encoder_hidden_states=prompt)
    return total(), max(blocks)


def main(as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False) -> None:
    """Print the table."""
    with torch.device("meta"):
        plain = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).to(torch.bfloat16).train()
        frugal = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).to(torch.bfloat16).train()
    frugal.enable_gradient_checkpointing()
    parameters = sum(p.numel() for p in plain.parameters())
    whole, largest = kept_bytes(plain)
    between, _ = kept_bytes(frugal)
    fixed = 4 * parameters * 2 + 4 * FROZEN * GB  # float32 weights and gradients
    table = Table("switches", "states GB", "per image GB", *(f"{n} images GB" for n in (1, 4, 8)))
    rows = []
    for optimizer, bytes_each in (("adamw", 8), ("adamw8bit", 2)):
        for ema in (False, True):
            for checkpointing in (False, True):
                states = fixed + parameters * (bytes_each + (4 if ema else 0))
                image, once = (between, largest) if checkpointing else (whole, 0)
                totals = [(states + count * (image + once)) / GB for count in (1, 4, 8)]
                name = f"{optimizer}{' + ema' if ema else ''}{' + gradient checkpointing' if checkpointing else ''}"
                rows.append({"switches": name, "states": states / GB, "image": (image + once) / GB, "totals": totals})
                table.add_row(name, f"{states / GB:.1f}", f"{(image + once) / GB:.2f}", *(f"{t:.1f}" for t in totals))
    if as_json:
        print(json.dumps({"parameters": parameters, "rows": rows}))
    else:
        Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
