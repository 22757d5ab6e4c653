"""The settings a bundle is scored with: frozen, documented and validated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from glad_core.errors import GladError, did_you_mean, one_line

if TYPE_CHECKING:
    from glad_core.views import Framing  # with NumPy, which reading settings does not need

Kind = Literal["squash", "fit", "tiles"]  # of a view
Profile = Literal["exact", "fast"]
Search = Literal["scan", "guarded"]  # how the stop step is found, `glad_core.engine.search`
Method = Literal["glad", "nearest"]
Precision = Literal["off", "bf16", "fp16"]  # of the networks' matrix products; off is float32


class FrozenSettings(BaseModel):
    """Settings that are checked once and cannot change; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

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
            name = one_line(".".join(str(part) for part in first["loc"]))
            if first["type"] == "extra_forbidden":
                raise GladError(f"{where}: unknown setting '{name}'{did_you_mean(name, cls.model_fields)}") from error
            message = first["msg"].removeprefix("Value error, ")
            raise GladError(f"{where}: {name + ': ' if name else ''}{message}") from error


class View(FrozenSettings):
    """One way to look at a picture (`glad_core.views`), and what the scores of good pictures are there.

    ``scale`` is that of tiles; of a whole picture, as the nearest good patches see it, a share of the square's side.
    With several views, a view's score is standardised: less ``good_mean``, divided by ``good_spread``.
    """

    kind: Kind = "squash"
    scale: float = Field(1.0, gt=0, le=8)
    overlap: float = Field(0.25, ge=0, le=0.75)
    good_mean: float = 0.0
    good_spread: float = Field(1.0, gt=0)


class Settings(FrozenSettings):
    """How a bundle reconstructs and scores. Symbols are the paper's (Sec. 3.3-3.6); timesteps count from 0 to 999."""

    variant: Literal["official", "paper"] = Field(
        "official", description="steps as in the released code, or as in the paper's equations"
    )
    resolution: int = Field(512, ge=8, le=4096, description="side of the square image that the VAE encodes, pixels")
    feature_resolution: int = Field(512, ge=8, le=4096, description="side at which the final map is compared, pixels")
    start_step: int = Field(750, ge=1, le=1000, description="T, the timestep to which an image is noised")
    inference_steps: int = Field(25, ge=1, le=1000, description="S, number of denoising steps from T to 0")
    min_step: int = Field(350, ge=0, le=1000, description="an image that reaches a timestep below this stops there")
    delta: float = Field(
        0.35, ge=0, description="δ, the step score above which an image stops; 0: every image walks all steps"
    )
    noise_index: Literal["T", "T-1"] = Field(
        "T", description="timestep of the start noise; published: T for MVTec-AD and MPDD, T-1 for the others"
    )
    guidance_scale: float = Field(9.0, ge=1, description="classifier-free guidance; 1 saves the unconditional call")
    saff: bool = Field(
        True, description="fuse image and reconstruction at the stop step (Eq. 7), else restart from the noised image"
    )
    restart_margin: int = Field(
        0, ge=0, description="timesteps above the stop step to restart from; variant `paper` without saff"
    )
    step_score_top_k: int = Field(10, ge=1, description="the step score is the mean of the K largest tokens; this is K")
    image_score_top_k: int = Field(
        250, ge=1, description="the image score is the mean of the K largest pixels; this is K"
    )
    blur_sigma: float = Field(6.0, ge=0, description="sigma of the full-size map's Gaussian blur, pixels")
    bidirectional: bool = Field(False, description="add the map of the reconstruction compared to the image")
    pixel_weight_v: float = Field(0.0, ge=0, description="v, weight of the pixel differences in the final map")
    foreground_mode: Literal[1, 2, 3] = Field(
        3, description="score only 1 the darker object, 2 the brighter object, or 3 the whole image"
    )
    compare_with: Literal["image", "round_trip"] = Field(
        "image",
        description="not in the paper: `round_trip` compares with the image after encoding and decoding by the VAE",
    )
    match: Literal["anywhere", "window", "sum"] = Field(
        "anywhere", description="not in the paper: `window` looks for a token's match nearby only; `sum` adds both maps"
    )
    window: int = Field(0, ge=0, description="radius of that window, tokens; 0: the same position only")
    profile: Profile = Field(
        "exact", description="not in the paper: `fast` is a single UNet call at T; needs its own T and threshold"
    )
    score_fall: float | None = Field(
        None,
        ge=0,
        description="largest fall of the step score along the chain of a good image; none: compare every step",
    )
    score_guess: tuple[float, float, float, float] | None = Field(
        None, description="coefficients from which the guarded search guesses step scores, to compare fewer steps"
    )
    method: Method = Field(
        "glad",
        description="not in the paper: `nearest` compares with good patches in the bundle, not a reconstruction",
    )
    views: tuple[View, ...] = Field(
        (View(),),
        min_length=1,
        max_length=6,
        description="not in the paper: how a picture is seen, `squash` as one square, `fit` as one with its aspect "
        "ratio kept, `tiles` at a scale in overlapping squares; of several the most anomalous counts",
    )
    white_level: float | None = Field(
        None,
        gt=0,
        description="stored value that is white in pictures of more than 8 bits, such as 4095 of a 12-bit camera; "
        "none: the whole range",
    )
    dark_level: float | None = Field(
        None, gt=0, description="largest stored value below which a picture of more than 8 bits is said to be dark"
    )
    picture_size: tuple[int, int] | None = Field(
        None, description="usual height and width of the training pictures, pixels"
    )
    threshold: float | None = Field(None, description="image score above which an image is called anomalous")
    thresholds: dict[str, float] = Field({}, description="thresholds of single categories, in a bundle for several")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.inference_steps > self.start_step:
            raise ValueError(
                f"inference_steps {self.inference_steps} is larger than start_step {self.start_step}: lower it"
            )
        return self

    def framings(self) -> tuple[Framing, ...]:
        """How each of the views frames a picture.

        Good patches are compared without a VAE, so a frame is as large there as the features take it; a tile then shows
        the same at a larger scale, or more of the picture at the picture's own.
        """
        from glad_core.views import Framing

        def framing(view: View) -> Framing:
            side, scale = self.resolution, view.scale
            if self.method == "nearest" and view.kind == "tiles":
                side = self.feature_resolution
                scale = min(scale * side / self.resolution, max(scale, 1.0))
            elif self.method == "nearest":
                side, scale = max(8, round(self.feature_resolution * view.scale)), 1.0
            return Framing(view.kind, side, scale, view.overlap, self.white_level)

        return tuple(map(framing, self.views))

    def judged_by(self, method: Method) -> Settings:
        """The settings for another method, with its views, which are not standardised.

        The nearest good patches see a whole picture at half the side too: what is wrong with a large part of it shows
        where a patch covers more. So they tell lighter or darker regions of magnetic tiles and solar cells from good
        ones better (image AUROC .65 and .73 of the whole picture, not .57 and .66), small spots and scratches worse.
        """
        if method == self.method:
            return self
        views: dict[tuple[Kind, float], View] = {}
        for view in self.views:
            tiles = view.kind == "tiles"
            for scale in (view.scale,) if tiles else (1.0, 0.5) if method == "nearest" else (1.0,):
                views[view.kind, scale] = View(kind=view.kind, scale=scale, overlap=view.overlap)
        return self.model_copy(update={"method": method, "views": tuple(views.values())})

    def threshold_for(self, category: str | None) -> float | None:
        """The threshold of one category: its own in a bundle for several, else the bundle's."""
        return self.thresholds.get(category or "", self.threshold)
