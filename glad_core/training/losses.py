"""The loss of each trained part: the paper's ATP for the UNet (Sec. 3.5), adaptation to good images for ViT and VAE.

Each loss is a module. Its parameters are trained, and its ``forward(rows)`` returns the loss of a few images, so one
loop, and DistributedDataParallel, serve all three. Frozen networks are kept in tuples, where neither the optimiser nor
a checkpoint finds them.

Shapes: B batch, C latent channels, H W latent grid, R image side, N good images, L D prompt tokens and their width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from glad_core import schedule
from glad_core.features import Backbone

Rows = dict[str, Tensor]
# The sum of each reported quantity and the number of values in it, so that batches can be added up.
Report = dict[str, tuple[float, float]]

BANDS = (0, 250, 500, 750)  # timestep bands of the reported loss
KL_WEIGHT = 1e-6  # as latent diffusion's autoencoders were trained (Rombach et al., 2022)


class AtpLoss(nn.Module):
    """Eq. 10 for rows of (possibly anomalous) images; trains the UNet, and prompt embeddings if they are learned.

    Args:
        clean: mean and std of the VAE's posterior of every good image, [N, C, H, W] each, computed once; None to encode
            the good images of the rows, which are tiles that seldom come again.
        prompts_KLD: one embedding per category.
        category_N: the category of every good image, int64.
        learn_prompts: train the embeddings too, since no text encoder made them.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        alphas: Tensor,
        clean: tuple[Tensor, Tensor] | None,
        prompts_KLD: Tensor,
        category_N: Tensor,
        *,
        blend: bool,
        max_timestep: int = 1000,
        autocast: torch.dtype | None = None,
        learn_prompts: bool = False,
    ) -> None:
        super().__init__()
        self.unet = unet.requires_grad_(True).train()
        self.prompts = nn.Parameter(prompts_KLD.clone(), requires_grad=learn_prompts)
        self.frozen = (vae,)
        self.alphas, self.clean, self.category_N = (alphas,), clean, category_N
        self.blend, self.max_timestep, self.autocast = blend, max_timestep, autocast

    @property
    def outer(self) -> list[nn.Module]:
        """The layers nearest the data, which Muon leaves to AdamW."""
        return [self.unet.conv_in, self.unet.conv_out]

    def forward(self, rows: Rows) -> tuple[Tensor, Report]:
        """Rows: ``index`` and ``seed`` int64 [B], ``image``, ``good`` uint8 [B, R, R, 3], ``mask`` bool [B, R, R]."""
        device = self.prompts.device
        (vae,), (alphas,) = self.frozen, self.alphas
        mean, std = self._clean(rows, device)
        t, eps, noise = draw(rows["seed"], mean.shape[1:], self.max_timestep)
        t, eps, noise = t.to(device), eps.to(device), noise.to(device)
        changed = rows["mask"].flatten(1).any(dim=1)
        with torch.no_grad():
            x, x_a = encode_pair(vae, mean, std, to_pixels(rows["image"][changed]), changed, noise)
        prompts = self.prompts[self.category_N[rows["index"]].to(device)]
        with torch.autocast(device.type, self.autocast or torch.float32, enabled=self.autocast is not None):
            error_BHW = atp_error(self.unet, alphas, x_a, x, eps, t, prompts, blend=self.blend)
        loss = error_BHW.mean()
        return loss, self._report(error_BHW.detach(), t, rows["mask"].to(device))

    @torch.no_grad()
    def _clean(self, rows: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.clean is not None:
            mean, std = (part[rows["index"]].to(device) for part in self.clean)
            return mean, std
        (vae,) = self.frozen
        posterior = vae.encode(to_pixels(rows["good"]).to(device)).latent_dist
        return posterior.mean, posterior.std

    def _report(self, error_BHW: Tensor, t_B: Tensor, mask_BRR: Tensor) -> Report:
        per_image = error_BHW.mean(dim=(1, 2))
        band_B = torch.bucketize(t_B, torch.tensor(BANDS[1:], device=t_B.device), right=True)
        region = F.adaptive_max_pool2d(mask_BRR[:, None].float(), error_BHW.shape[-2:])[:, 0] > 0
        report = {f"loss_t{low}": per_image[band_B == band] for band, low in enumerate(BANDS)}
        report |= {"loss_normal": error_BHW[~region], "loss_abnormal": error_BHW[region]}
        return {name: (float(values.sum()), float(values.numel())) for name, values in report.items()}


class FeatureLoss(nn.Module):
    """The released code's DINO adaptation: features of a good image and of its reconstruction come closer.

    Per block used: 1 - cos(F(x), F(x̂)) + λ·[1 - cos(F(x), F⁰(x))] + λ·[1 - cos(F(x̂), F⁰(x̂))] on flattened tokens, F⁰
    the frozen network. Only the MLPs of the blocks used are trained; of a network without blocks the stages used.

    Args:
        reconstructions: of every good image, uint8 [N, R, R, 3].
        size: side at which features are compared, pixels.
    """

    def __init__(
        self,
        backbone: Backbone,
        frozen: Backbone,
        reconstructions: Tensor,
        size: int,
        keep: float,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        for weight in backbone.adaptable():
            weight.requires_grad_(True)
        self.frozen, self.reconstructions = (frozen,), reconstructions
        self.size, self.keep, self.autocast = size, keep, autocast

    outer: Sequence[nn.Module] = ()

    def forward(self, rows: Rows) -> tuple[Tensor, Report]:
        """Rows: ``index`` int64 [B], ``image`` uint8 [B, R, R, 3]."""
        device = next(self.backbone.parameters()).device
        both = to_pixels(torch.cat([rows["image"], self.reconstructions[rows["index"]]])).to(device)
        both = F.interpolate(both, size=(self.size, self.size), mode="bilinear", align_corners=True)
        both = self.backbone.normalize(both)
        (original,) = self.frozen
        with torch.autocast(device.type, self.autocast or torch.float32, enabled=self.autocast is not None):
            adapted = self.backbone(both)
            with torch.no_grad():
                original_tokens = original(both)
        distance = torch.stack([_cosine_distance(*tokens.float().chunk(2)) for tokens in adapted]).sum(0)
        pairs = zip(adapted, original_tokens, strict=True)
        change = torch.stack([_cosine_distance(a.float(), b.float()) for a, b in pairs]).sum(0)
        change = change[: len(distance)] + change[len(distance) :]
        loss = (distance + self.keep * change).mean()
        return loss, {"feature_distance": _summed(distance), "feature_change": _summed(change)}


class CodecLoss(nn.Module):
    """Adaptation of the autoencoder to good images: |x - x̂| + the features' distance + `KL_WEIGHT` · KL."""

    def __init__(self, vae: AutoencoderKL, backbone: Backbone, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(True).train()
        self.frozen, self.autocast = (backbone,), autocast

    @property
    def outer(self) -> list[nn.Module]:
        """The layers nearest the pixels, which Muon leaves to AdamW."""
        return [self.vae.encoder.conv_in, self.vae.decoder.conv_out]

    def forward(self, rows: Rows) -> tuple[Tensor, Report]:
        """Rows: ``seed`` int64 [B], ``image`` uint8 [B, R, R, 3]."""
        device = next(self.vae.parameters()).device
        (backbone,) = self.frozen
        images = to_pixels(rows["image"]).to(device)
        with torch.autocast(device.type, self.autocast or torch.float32, enabled=self.autocast is not None):
            posterior = self.vae.encode(images).latent_dist
            _, _, noise = draw(rows["seed"], posterior.mean.shape[1:], 1)
            rebuilt = self.vae.decode(posterior.mean + posterior.std * noise.to(device)).sample.float()
            both = backbone.normalize(torch.cat([images, rebuilt]))
            tokens = backbone(both)
        pixels = (images - rebuilt).abs().mean(dim=(1, 2, 3))
        distance = torch.stack([_cosine_distance(*layer.float().chunk(2)) for layer in tokens]).mean(0)
        kl = posterior.kl().float()
        loss = (pixels + distance + KL_WEIGHT * kl).mean()
        return loss, {"pixel_error": _summed(pixels), "feature_distance": _summed(distance), "kl": _summed(kl)}


def to_pixels(images_BRR3: Tensor) -> Tensor:
    """uint8 [B, R, R, 3] to float32 [B, 3, R, R] in [-1, 1]."""
    return images_BRR3.permute(0, 3, 1, 2).float() / 127.5 - 1


def draw(seed_B: Tensor, shape: Sequence[int], max_timestep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw t [B], ε and the posterior's noise, [B, *shape] each, of every row from its own seed, on the CPU."""
    ts, pairs = [], []
    for seed in seed_B.tolist():
        generator = torch.Generator().manual_seed(seed)
        ts.append(torch.randint(0, max_timestep, (), generator=generator))
        pairs.append(torch.randn((2, *shape), generator=generator))
    eps, noise = torch.stack(pairs, dim=1)
    return torch.stack(ts), eps, noise


def encode_pair(
    vae: AutoencoderKL,
    mean_BCHW: Tensor,
    std_BCHW: Tensor,
    anomalous_M3RR: Tensor,
    changed_B: Tensor,
    noise_BCHW: Tensor,
) -> tuple[Tensor, Tensor]:
    """Latents of good images, from their posteriors, and of their anomalous twins, with the same posterior noise.

    The released code shares the noise too. Only the M ``changed`` images are encoded; the others equal their
    twins.
    """
    x = (mean_BCHW + std_BCHW * noise_BCHW) * vae.config.scaling_factor
    x_a = x.clone()
    if len(anomalous_M3RR):
        posterior = vae.encode(anomalous_M3RR.to(x.device)).latent_dist
        changed_B = changed_B.to(x.device)
        x_a[changed_B] = (posterior.mean + posterior.std * noise_BCHW[changed_B]) * vae.config.scaling_factor
    return x, x_a


def alpha_blend(anomalous_BCHW: Tensor, normal_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """The released code's blend: α·x^a + (1 - α)·x with α = t / 1000, so the anomaly fades at small timesteps."""
    alpha = (t_B.to(anomalous_BCHW.dtype) / 1000).view(-1, 1, 1, 1)
    return alpha * anomalous_BCHW + (1 - alpha) * normal_BCHW


def atp_target(alphas: Tensor, anomalous_BCHW: Tensor, normal_BCHW: Tensor, eps_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """Eq. 9: ε - √ᾱ_t/√(1-ᾱ_t)·(x^a - x), the value that the UNet learns to predict.

    Computed in float64, as in the released code, since the factor reaches about 34 near t = 0; returned in float32.
    """
    alpha_bar = alphas.to(t_B.device)[t_B].double().view(-1, 1, 1, 1)
    factor = (alpha_bar / (1 - alpha_bar)).sqrt()
    return (eps_BCHW.double() - factor * (anomalous_BCHW.double() - normal_BCHW.double())).float()


def atp_error(
    unet: UNet2DConditionModel,
    alphas: Tensor,
    anomalous_BCHW: Tensor,
    normal_BCHW: Tensor,
    eps_BCHW: Tensor,
    t_B: Tensor,
    prompts_BLD: Tensor,
    *,
    blend: bool,
) -> Tensor:
    """The squared error of Eq. 10 at every position, averaged over channels, [B, H, W]; its mean is the loss.

    ``blend`` first mixes x^a with x (`alpha_blend`, the released code).
    """
    if blend:
        anomalous_BCHW = alpha_blend(anomalous_BCHW, normal_BCHW, t_B)
    target = atp_target(alphas, anomalous_BCHW, normal_BCHW, eps_BCHW, t_B)
    noisy = schedule.add_noise(alphas, anomalous_BCHW, eps_BCHW, t_B)
    prediction = unet(noisy, t_B, encoder_hidden_states=prompts_BLD).sample
    return (prediction.float() - target).square().mean(dim=1)


def _cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos of flattened features, [B]."""
    return 1 - F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)


def _summed(values_B: Tensor) -> tuple[float, float]:
    return float(values_B.detach().sum()), float(values_B.numel())
