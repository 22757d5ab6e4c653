"""Parity with the authors' released code: every case of a folder of golden numbers.

The folder (environment variable GLAD_GOLDEN, by default ../shared/golden beside the checkout) holds tiny models and
arrays recorded from the released code. Whatever cases it holds are run; nothing is tied to particular ones.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from numpy.testing import assert_allclose, assert_array_equal
from oracles import pixel_metrics
from safetensors.torch import load_file

from glad_core import adaptive, features, schedule, scoring
from glad_core.bundle.model import Model
from glad_core.bundle.settings import Settings
from glad_core.image_metrics import image_metrics
from glad_core.judge import final_token_map
from glad_core.training import losses

FOLDER = Path(os.environ.get("GLAD_GOLDEN") or Path(__file__).parents[1] / ".." / "shared" / "golden")


def cases(pattern: str) -> list[str]:
    return sorted(path.stem for path in FOLDER.glob(pattern + ".json"))


if not cases("case_*"):
    pytest.skip(f"no golden numbers in {FOLDER} (set GLAD_GOLDEN)", allow_module_level=True)


class Case:
    """One json with its npz; arrays a case leaves out come from the case named by ``inputs_from``."""

    def __init__(self, name: str) -> None:
        self.settings = json.loads((FOLDER / f"{name}.json").read_text())
        self.arrays = np.load(FOLDER / f"{name}.npz")
        source = self.settings.get("inputs_from")
        self.inputs = Case(source) if source else None

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key] if key in self.arrays or self.inputs is None else self.inputs[key]

    def tensor(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self[key])


@cache
def load_backbone(family: str, name: str) -> features.Backbone:
    folder = FOLDER / f"models_{family}"
    config = json.loads((folder / "dino_config.json").read_text())
    args = {key: config[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    backbone = features.create_backbone("vit_tiny_patch16_224", qkv_bias=config["qkv_bias"], **args)
    assert backbone.net.norm.eps == config["norm_eps"]
    weights = folder / f"{name}.safetensors"
    backbone.net.load_state_dict(load_file(weights if weights.exists() else folder / "dino.safetensors"))
    return backbone


@cache
def networks(family: str) -> tuple[UNet2DConditionModel, AutoencoderKL, dict[str, torch.Tensor]]:
    folder = FOLDER / f"models_{family}"
    unet = UNet2DConditionModel.from_config(json.loads((folder / "unet_config.json").read_text()))
    unet.load_state_dict(load_file(folder / "unet.safetensors"))
    vae = AutoencoderKL.from_config(json.loads((folder / "vae_config.json").read_text()))
    vae.load_state_dict(load_file(folder / "vae.safetensors"))
    return unet.eval(), vae.eval(), load_file(folder / "prompt.safetensors")


def model_of(family: str, settings: Settings) -> Model:
    unet, vae, prompts = networks(family)
    return Model(
        unet=unet,
        vae=vae,
        features=load_backbone(family, "dino"),
        final_features=load_backbone(family, "dino_final"),
        prompt_cond=prompts["cond"],
        prompt_uncond=prompts["uncond"],
        alphas=schedule.alphas_cumprod(),
        settings=settings,
        category="golden",
        model_id="golden",
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def settings_of(case: Case, **changes: object) -> Settings:
    s = case.settings
    values: dict = {
        "variant": "official",
        "resolution": s["resolution"],
        "feature_resolution": s["dino_resolution"],
        "start_step": s["denoise_step_T"],
        "inference_steps": s["inference_steps_S"],
        "min_step": s["min_step"],
        "delta": s["input_threshold"],
        "noise_index": s["add_noise_index"],
        "guidance_scale": s["guidance_scale"],
        "step_score_top_k": s["step_topk"],
        "image_score_top_k": s["topk_score"],
        "blur_sigma": s["final_blur"]["sigma"],
    }
    return Settings(**{**values, **changes})


def check(
    case: Case, key: str, got: torch.Tensor | np.ndarray, atol: float, expected: np.ndarray | None = None
) -> None:
    """Within ``atol`` of the recorded array, where the case holds it; GLAD_GOLDEN_REPORT=1 prints the largest error."""
    if key in case:
        got = np.asarray(got, dtype=np.float64)
        expected = np.asarray(case.arrays[key] if expected is None else expected, dtype=np.float64)
        assert_allclose(got, expected, rtol=0, atol=atol, err_msg=key)
        if os.environ.get("GLAD_GOLDEN_REPORT"):
            error = np.abs(got - expected)
            print(f"{case.settings.get('case', '')} {key}: max error {np.nanmax(error, initial=0):.2e} of {atol:.1e}")


def over_images(runs: list[list[adaptive.Step]], value: str, shape: tuple[int, ...]) -> np.ndarray:
    """[S, B, ...] of one quantity of the steps of consecutive runs; NaN where an image was not compared."""
    whole = []
    for steps in runs:
        size = len(steps[0].rows)
        values = np.full((len(steps), size, *shape), np.nan)
        for index, step in enumerate(steps):
            item = getattr(step, value)
            rows = step.rows[step.compared] if value in ("x0_true", "map_bhw", "score") else step.rows
            if item is not None:
                values[index, rows.numpy()] = item.double().numpy()
        whole.append(values)
    return np.concatenate(whole, axis=1)


@pytest.mark.filterwarnings("ignore:Only one class:sklearn.exceptions.UndefinedMetricWarning")
@pytest.mark.parametrize("name", cases("case_*"))
def test_inference(name: str) -> None:
    case = Case(name)
    s = case.settings
    model = model_of(s["model_family"], settings_of(case))
    total = s["n_images"]
    size = 1 if s["runs_of_batch1"] else total
    runs = []
    with torch.inference_mode():
        for rows in torch.arange(total).split(size):
            steps: list[adaptive.Step] = []
            result = adaptive.reconstruct(
                model,
                case.tensor("images")[rows],
                case.tensor("noise")[rows],
                case.tensor("enc_noise")[rows],
                on_step=steps.append,
            )
            runs.append((result, steps))

    ts = schedule.timesteps(s["denoise_step_T"], s["inference_steps_S"])
    assert ts == case["timesteps"].tolist()
    stride = s["denoise_step_T"] // s["inference_steps_S"]
    assert_array_equal(np.array(ts) - stride, case["prev_timesteps"])

    # Exact: where each image stops, why, and which images were still searching at each step.
    stops = [stop or 0 for result, _ in runs for stop in result.stop_step]
    assert stops == case["de_step"].tolist()
    kinds = {"difference": "threshold", "min_step": "min_step", "none": "never"}
    assert [kinds[reason] for result, _ in runs for reason in result.stop_reason] == s["stop_kind"]

    searching = np.concatenate([torch.stack([step.compared for step in steps]).numpy() for _, steps in runs], axis=1)
    traces = [steps for _, steps in runs]
    latent, grid = case["image_latents"].shape[1:], case["step_anomaly_map"].shape[2:]
    before = case["step_flag_before"]
    if s["input_threshold"] > 0:
        assert_array_equal(searching, before)
        after = np.concatenate([searching[1:], np.zeros_like(searching[:1])])
        assert_array_equal(after[:-1], case["step_flag_after"][:-1])
    else:
        assert not searching.any()

    check(case, "image_latents", torch.cat([result.input_latents for result, _ in runs]), 1e-5)
    start = s["denoise_step_T"] - (s["add_noise_index"] == "T-1")
    start_B = torch.full((total,), start)
    noisy = schedule.add_noise(model.alphas, case.tensor("image_latents"), case.tensor("noise"), start_B)
    check(case, "noisy_latents", noisy, 1e-5)
    for key, value in (("step_noise_pred", "eps"), ("step_x0_hat", "x0_hat"), ("step_latents_out", "latents")):
        check(case, key, over_images(traces, value, latent), 1e-3)
    # The released code compares the whole batch until its last image has stopped; we compare images still searching.
    for key, value, shape, atol in (
        ("step_x0_true", "x0_true", latent, 1e-3),
        ("step_anomaly_map", "map_bhw", grid, 2.5e-3),
        ("step_score", "score", (), 2.5e-4),
    ):
        if key in case and searching.any():
            expected = np.where(searching.reshape(searching.shape + (1,) * len(shape)), case[key], np.nan)
            check(case, key, over_images(traces, value, shape), atol, expected)
    if "stop_x0_used" in case:
        used = np.full(case["stop_x0_used"].shape, np.nan)
        x0 = over_images(traces, "x0", latent)
        for image, stop in enumerate(stops):
            if stop:
                used[image] = x0[ts.index(stop), image]
        check(case, "stop_x0_used", used, 1.5e-3)
    check(case, "latents_final", torch.cat([result.latents for result, _ in runs]), 1e-3)
    with torch.inference_mode():
        recon = torch.cat([adaptive.decode(model, result.latents) for result, _ in runs])
    check(case, "recon", recon, 2e-4)
    final_maps(case, model, recon, size)


def final_maps(case: Case, model: Model, recon: torch.Tensor, size: int) -> None:
    """The final comparison in every variant recorded: plain, bidirectional, pixel distance, object mask, all."""
    s = case.settings
    images, resolution = case.tensor("images"), s["dino_resolution"]
    masks_int = F.interpolate(
        case.tensor("gt_masks").float(), size=(resolution, resolution), mode="bilinear", align_corners=True
    )[:, 0].int()
    if "masks_int" in case:
        assert_array_equal(masks_int.numpy(), case["masks_int"])
    for variant, options in s["variants"].items():
        settings = settings_of(case, bidirectional=options["bidirectional"])
        scored = Model(**{**vars(model), "settings": settings})
        maps, preblur, distances = [], [], []
        for rows in torch.arange(len(images)).split(size):
            with torch.inference_mode():
                tokens, distance = final_token_map(scored, images[rows], recon[rows])
            distances.append(distance)
            full = scoring.resize_map(tokens, resolution)
            full = scoring.add_pixel_distance(full, distance, options["v"], scope="batch")
            preblur.append(full)
            full = scoring.smooth(full, settings.blur_sigma).double()
            if options["object_mask"]:
                full = full * scoring.resize_map(case.tensor("object_mask")[rows], resolution)
            maps.append(full)
        whole = torch.cat(maps)
        scores = scoring.image_score(whole, settings.image_score_top_k)
        check(case, f"map_preblur_{variant}", torch.cat(preblur), 6e-4)
        check(case, f"map_{variant}", whole, 6e-4)
        check(case, f"score_{variant}", scores, 4e-4)
        check(case, "distance_map", torch.cat(distances), 6e-4)
        if f"metrics_{variant}" in case and f"map_{variant}" in case:
            # From the recorded maps, rounded to float32: a pixel may change sides of a PRO threshold.
            got = metric_values(case[f"score_{variant}"], case["labels"], case[f"map_{variant}"], case["masks_int"])
            check(case, f"metrics_{variant}", np.array([got[key] for key in s["metrics_order"]]), 5e-4)


def metric_values(scores: np.ndarray, labels: np.ndarray, maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    image = {f"I-{key}": value for key, value in image_metrics(scores, labels).items()}
    return image | pixel_metrics(maps, masks)


@pytest.mark.parametrize("name", cases("dino_*"))
def test_features(name: str) -> None:
    case = Case(name)
    vit = load_backbone(case.settings["model_family"], "dino").net
    for key in case.arrays.files:
        if not key.startswith("images_"):
            continue
        size = key.removeprefix("images_")
        grid = int(size) // case.settings["patch"]
        check(case, f"pos_embed_used_{size}", features.position_embedding(vit, grid).detach(), 3e-5)
        blocks = range(1, len(vit.blocks) + 1)
        with torch.inference_mode():
            tokens = features.all_tokens(vit, case.tensor(key), blocks)
            check(case, f"cls_normed_{size}", vit.norm(tokens[-1])[:, 0], 3e-5)
        for block in blocks:
            check(case, f"tokens_{size}_block{block}", tokens[block - 1], 3e-5)


@pytest.mark.parametrize("name", cases("train*"))
def test_training_target(name: str) -> None:
    case = Case(name)
    unet, _, prompts = networks(case.settings["model_family"])
    alphas = schedule.alphas_cumprod()
    t, eps = case.tensor("timesteps"), case.tensor("noise")
    model = model_of(case.settings["model_family"], Settings(resolution=case.settings["resolution"]))
    with torch.no_grad():
        posterior = case.tensor("posterior_noise")
        normal = adaptive.encode(model, case.tensor("normal_images"), posterior)
        anomalous = adaptive.encode(model, case.tensor("anomaly_images"), posterior)
    check(case, "latents_normal", normal, 1e-5)
    check(case, "latents_anomaly", anomalous, 1e-5)
    normal, anomalous = case.tensor("latents_normal"), case.tensor("latents_anomaly")

    blend = losses.alpha_blend(anomalous, normal, t)
    check(case, "latents_blend", blend, 1e-6)
    check(case, "noisy_input", schedule.add_noise(alphas, blend, eps, t), 1e-5)
    check(case, "eps_target", losses.atp_target(alphas, blend, normal, eps, t), 1e-6)
    check(case, "eps_target_paper_eq10", losses.atp_target(alphas, anomalous, normal, eps, t), 1e-6)
    check(case, "noisy_input_paper", schedule.add_noise(alphas, anomalous, eps, t), 1e-5)

    cond = prompts["cond"].expand(len(t), -1, -1)
    unet.requires_grad_(True)
    unet.zero_grad()
    loss = losses.atp_error(unet, alphas, anomalous, normal, eps, t, cond, blend=True).mean()
    check(case, "loss", loss.detach(), 1e-6)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    check(case, "grad_norm_before_clip", norm, 1e-4)
    for key in case.arrays.files:
        if key.startswith("grad_clipped/"):
            check(case, key, unet.get_parameter(key.removeprefix("grad_clipped/")).grad, 1e-5)
    unet.zero_grad()
    with torch.no_grad():
        paper = losses.atp_error(unet, alphas, anomalous, normal, eps, t, cond, blend=False).mean()
        check(case, "loss_paper_mse", paper, 1e-6)

    if "extreme_timesteps" in case:
        extreme = case.tensor("extreme_timesteps")
        expand = (len(extreme), -1, -1, -1)
        normal_1, anomalous_1, eps_1 = (x[1:2].expand(expand) for x in (normal, anomalous, eps))
        blend = losses.alpha_blend(anomalous_1, normal_1, extreme)
        check(case, "extreme_blend", blend, 1e-6)
        target = losses.atp_target(alphas, blend, normal_1, eps_1, extreme)
        check(case, "extreme_eps_target", target, 1e-6)
        target = losses.atp_target(alphas, anomalous_1, normal_1, eps_1, extreme)
        check(case, "extreme_eps_target_paper", target, 1e-6)


@pytest.mark.parametrize("name", cases("metrics*"))
def test_metrics(name: str) -> None:
    case = Case(name)
    got = metric_values(case["image_scores"], case["labels"], case["maps"], case["masks"])
    for key, expected in case.settings["values"].items():
        assert got[key.replace("_", "-")] == pytest.approx(expected, abs=1e-9), key
