"""From images to verdicts: noise per image, reconstruction, final comparison, score.

The interface between the method and what runs it: requests in, verdicts out, in any order.

Shapes: B images, C latent channels, H W latent grid, g token grid, R image side, D feature resolution.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glad_core import adaptive, scoring
from glad_core.bundle.model import Model
from glad_core.bundle.settings import Settings
from glad_core.foreground import object_mask
from glad_core.verdict import Detection, NotFinite, Request, check_request, finite


def image_noise(image_RR3: np.ndarray, seed: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """ε and the posterior noise of one image, float32 ``shape`` each, from the run's seed and the image's pixels alone.

    So a picture that is renamed, moved or doubled keeps its verdict. Always drawn on the CPU, so that a result depends
    neither on the device nor on the other images.

    Args:
        image_RR3: uint8, as the networks get it.
    """
    digest = hashlib.sha256(f"{seed}:{image_RR3.shape}:".encode() + np.ascontiguousarray(image_RR3).tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def map_at_full_size(settings: Settings, detection: Detection) -> Tensor:
    """The map that the image score was taken from, float32 [D, D]; of a picture of several tiles, of its shape."""
    kept = torch.from_numpy(detection.anomaly_map).float()
    size = detection.full_size or (settings.feature_resolution,) * 2
    return kept if kept.shape == size else scoring.full_size_map(kept[None], settings, size)[0]


def final_token_map(model: Model, test_B3RR: Tensor, reconstruction_B3RR: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 11-12 between image and reconstruction: token map [B, g, g] and pixel distance [B, D, D].

    Both images are first resized to the feature resolution and normalised as the features were trained.
    """
    s = model.settings
    size = (s.feature_resolution, s.feature_resolution)
    both = torch.cat([test_B3RR, reconstruction_B3RR])
    both = F.interpolate(both, size=size, mode="bilinear", align_corners=True)
    both = model.final_features.normalize(both)
    with model.precision():
        layers = model.final_features(both)
    tokens = [layer.float().chunk(2) for layer in layers]
    maps = scoring.token_map(
        [pair[0] for pair in tokens],
        [pair[1] for pair in tokens],
        match=s.match,
        radius=s.window,
        bidirectional=s.bidirectional,
    )
    test, reconstruction = both.float().chunk(2)
    return maps, scoring.pixel_distance(test, reconstruction)


@dataclass(frozen=True)
class Prepared:
    """A batch as tensors: x^a [B, 3, R, R] in [-1, 1], ε and posterior noise [B, C, H, W], prompts."""

    images: Tensor
    eps: Tensor
    posterior_noise: Tensor
    prompts: Tensor


def prepare(model: Model, requests: Sequence[Request], seed: int) -> Prepared:
    """Requests as tensors on the model's device.

    Raises:
        GladError: as `check_request`.
    """
    s = model.settings
    for request in requests:
        check_request(model, request)
    prompts = model.prompts_for([request.category for request in requests])
    pixels = torch.from_numpy(np.stack([request.image for request in requests])).permute(0, 3, 1, 2)
    images = (pixels.to(model.device).float() / 127.5 - 1).to(model.dtype)
    side = s.resolution // model.vae_factor
    shape = (model.vae.config.latent_channels, side, side)
    noises = [image_noise(request.image, seed, shape) for request in requests]
    eps, posterior_noise = (torch.stack(part).to(model.device, model.dtype) for part in zip(*noises, strict=True))
    return Prepared(images, eps, posterior_noise, prompts)


def conclude(
    model: Model, images_B3RR: Tensor, z_BCHW: Tensor, latents_BCHW: Tensor
) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """Judge each image (Sec. 3.6) by its latents z and those of its reconstruction.

    Returns:
        Score, anomaly map and reconstruction of every image, as in `Detection`.
    """
    s = model.settings
    if s.compare_with == "round_trip":
        test, rebuilt = adaptive.decode(model, torch.cat([z_BCHW, latents_BCHW])).chunk(2)
    else:
        test, rebuilt = images_B3RR, adaptive.decode(model, latents_BCHW)
    token_maps, distance = final_token_map(model, test, rebuilt)
    if scoring.full_size_only(s):
        maps = scoring.resize_map(token_maps, s.feature_resolution)
        maps = scoring.smooth(scoring.add_pixel_distance(maps, distance, s.pixel_weight_v, scope="image"), s.blur_sigma)
        if s.foreground_mode != 3:
            mask = object_mask(images_B3RR.float(), s.foreground_mode)
            maps = maps * scoring.resize_map(mask, s.feature_resolution)
        kept = maps
    else:
        maps, kept = scoring.full_size_map(token_maps, s), token_maps
    scores = scoring.image_score(maps, s.image_score_top_k).tolist()
    pixels = ((rebuilt.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return list(zip(scores, kept.to(torch.float16).cpu().numpy(), pixels, strict=True))


@torch.inference_mode()
def detect(model: Model, requests: Sequence[Request], seed: int = 0) -> Iterator[Detection]:
    """Judge images as one batch with the reference loop; `glad_core.engine.engine` gives the same verdicts faster.

    Raises:
        GladError: as `prepare`. NotFinite: there is no verdict on the next image.
    """
    if not requests:
        return
    started = time.perf_counter()
    inputs = prepare(model, requests, seed)
    result = adaptive.reconstruct(model, inputs.images, inputs.eps, inputs.posterior_noise, prompts_BLD=inputs.prompts)
    verdicts = conclude(model, inputs.images, result.input_latents, result.latents)
    seconds = (time.perf_counter() - started) / len(requests)
    for row, request in enumerate(requests):
        score, anomaly_map, rebuilt = verdicts[row]
        verdict = finite(
            Detection(
                image_id=request.image_id,
                score=score,
                stop_step=result.stop_step[row],
                stop_reason=result.stop_reason[row],
                steps=result.steps[row],
                anomaly_map=anomaly_map,
                reconstruction=rebuilt,
                seconds=seconds,
            )
        )
        if isinstance(verdict, NotFinite):
            raise verdict
        yield verdict
