"""Options and arguments that several commands share, and what `--json` prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from glad_core.bundle.settings import Precision
from glad_core.training.recipe import Optimizer, Part

Device = Literal["cpu", "cuda", "mps"]
Promote = Literal["always", "gate", "never"]

Json = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON; messages go to stderr")]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster, host:port or auto; default: Ray is started on this machine")
]
Results = Annotated[str, typer.Argument(help="Results of a `glad score`: its --out, local or s3://")]
Base = Annotated[str, typer.Option(help="Model bundle to start from, local or s3://; 'small' is the built-in one")]
Steps = Annotated[int | None, typer.Option(min=1, help="Training steps; default: the base bundle's recipe")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Images per training step; default: the base bundle's recipe")
]
LearningRate = Annotated[float | None, typer.Option(min=0, help="Learning rate; default: the base bundle's recipe")]
PartChoice = Annotated[
    Part, typer.Option(help="Network to train: unet denoises; dino compares images; vae encodes them")
]
MicroBatch = Annotated[
    int | None, typer.Option(min=1, help="Images in memory at once per worker; default: its share of --batch-size")
]
PrecisionChoice = Annotated[
    Precision | None,
    typer.Option(help="Number format of matrix products: off is float32; default: the base bundle's recipe"),
]
GradientCheckpointing = Annotated[
    bool | None, typer.Option("--gradient-checkpointing", help="Use less memory, take a third more time")
]
OptimizerChoice = Annotated[
    Optimizer | None,
    typer.Option(help="adamw8bit needs bitsandbytes and a GPU; default: the base bundle's recipe"),
]
Ema = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Decay of a moving average of the weights; default: the base bundle's recipe"),
]
Anomalies = Annotated[
    bool,
    typer.Option(
        "--anomalies/--no-anomalies", help="Train with synthetic anomalies, or a plain diffusion model to compare"
    ),
]
Exclude = Annotated[
    str | None,
    typer.Option(help="Results over the good images: leave out those confirmed as anomalous in `glad view`"),
]
Include = Annotated[
    str | None, typer.Option(help="Results of any run: add the images marked as false alarms in `glad view`")
]
Textures = Annotated[
    str | None, typer.Option(help="Folder of pictures to cut synthetic anomalies from; default: each image itself")
]
Views = Annotated[
    str | None,
    typer.Option(
        help="How pictures are seen, with commas between: squash (as one square), fit (aspect ratio kept), tiles (cut "
        "into squares); default: chosen by the training pictures' sizes"
    ),
]
Scale = Annotated[
    float | None, typer.Option(min=0.01, max=8, help="Of tiles: their pixels per pixel of the picture; default: 1")
]
Overlap = Annotated[
    float | None,
    typer.Option(min=0, max=0.75, help="Of tiles: share of the side in which neighbours overlap; default: 0.25"),
]
TargetFpr = Annotated[
    float, typer.Option(min=0.001, max=0.5, help="Share of good images that may be called anomalous by mistake")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all random numbers")]
DeviceChoice = Annotated[
    Device | None, typer.Option(help="Device to train on; default: cuda if there is a GPU, else cpu")
]


def on_this_machine(path: Path | None) -> Path | None:
    """The check of an option for a local path: the folder that `Path` makes of s3://bucket is never meant."""
    if path is not None and re.match("[A-Za-z0-9+.-]{2,}:/", str(path)):
        raise typer.BadParameter(f"'{path}' is on no disk: give a local path here, and copy to or from S3 yourself")
    return path


def print_json(result: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Print one line of JSON on stdout; NaN and infinities, which JSON does not have, become null."""
    plain = json.loads(json.dumps(result), parse_constant=lambda name: None)
    print(json.dumps(plain, ensure_ascii=False))
