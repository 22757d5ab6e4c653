"""What a bundle is scored with: one frozen, documented, validated table."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from glad_core.errors import GladError, did_you_mean

Profile = Literal["exact", "fast"]
Search = Literal["scan", "guarded"]  # how the stop step is found, `glad_core.engine.search`
Precision = Literal["off", "bf16", "fp16"]  # of the networks' matrix products; off is float32


class FrozenSettings(BaseModel):
    """A table of settings that is checked once, cannot change, and knows every one of its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, values: dict[str, Any], where: str) -> Self:
        """Settings from untrusted values.

        Raises:
            GladError: one line that begins with ``where`` and names the wrong key; for an unknown key also the nearest
                known one.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                raise GladError(f"{where}: unknown setting '{name}'{did_you_mean(name, cls.model_fields)}") from error
            message = first["msg"].removeprefix("Value error, ")
            raise GladError(f"{where}: {name + ': ' if name else ''}{message}") from error


class Settings(FrozenSettings):
    """How one bundle reconstructs and scores. Symbols are the paper's (Sec. 3.3-3.6); timesteps count from 0 to 999."""

    variant: Literal["official", "paper"] = Field("official", description="the released code's steps, or the equations")
    resolution: int = Field(512, ge=8, description="side of the square image the VAE sees, pixels")
    feature_resolution: int = Field(512, ge=8, description="side at which the final map is compared, pixels")
    start_step: int = Field(750, ge=1, le=1000, description="T, the timestep the image is noised to")
    inference_steps: int = Field(25, ge=1, le=1000, description="S, denoising steps from T to 0")
    min_step: int = Field(350, ge=0, le=1000, description="an image that reaches a timestep below this stops there")
    delta: float = Field(0.35, ge=0, description="δ, the step score above which an image stops; 0: plain DDIM, no ADS")
    noise_index: Literal["T", "T-1"] = Field(
        "T", description="ᾱ index of the start noise: MVTec-AD, MPDD T, others T-1"
    )
    guidance_scale: float = Field(9.0, ge=1, description="classifier-free guidance; 1 saves the unconditional call")
    saff: bool = Field(True, description="fuse at the stop step (Eq. 7); without it the chain restarts from x^a")
    restart_margin: int = Field(0, ge=0, description="n of x^a_{t+n} in timesteps, `paper` variant without SAFF")
    step_score_top_k: int = Field(10, ge=1, description="K of the step score, tokens")
    image_score_top_k: int = Field(250, ge=1, description="K of the image score, pixels of the full-size map")
    blur_sigma: float = Field(6.0, ge=0, description="Gaussian blur of the full-size map, pixels")
    bidirectional: bool = Field(False, description="add the reconstruction-to-image map")
    pixel_weight_v: float = Field(0.0, ge=0, description="v, weight of the pixel distance in the final map")
    foreground_mode: Literal[1, 2, 3] = Field(3, description="score 1 darker, 2 brighter object only, 3 whole image")
    compare_with: Literal["image", "round_trip"] = Field(
        "image", description="extension: compare with the VAE's own round trip of the image instead of the raw image"
    )
    match: Literal["anywhere", "window", "sum"] = Field(
        "anywhere", description="extension: where Eq. 11 may look for its match; `sum` adds both maps"
    )
    window: int = Field(0, ge=0, description="radius of the window match, tokens; 0 is the same place only")
    profile: Profile = Field(
        "exact", description="extension: `fast` is one UNet call at T and no steps; needs its own T and threshold"
    )
    score_fall: float | None = Field(
        None,
        ge=0,
        description="largest fall of the step score along the chain of a good image; None: compare every step",
    )
    score_guess: tuple[float, float, float, float] | None = Field(
        None, description="how the guarded search guesses step scores from departures, to begin where δ was passed"
    )
    threshold: float | None = Field(None, description="image score above which an image is called anomalous")
    thresholds: dict[str, float] = Field({}, description="of single categories, in a bundle for several")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.inference_steps > self.start_step:
            raise ValueError(
                f"inference_steps {self.inference_steps} is larger than start_step {self.start_step}: lower it"
            )
        return self

    def threshold_for(self, category: str | None) -> float | None:
        """The threshold of one category: its own in a bundle for several, else the bundle's."""
        return self.thresholds.get(category or "", self.threshold)
