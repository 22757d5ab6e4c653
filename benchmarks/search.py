"""How often each way to search finds the stop step that comparing every step finds, and how many steps it compares.

    python benchmarks/search.py [--json]                                     demo boards, the small bundle
    python benchmarks/search.py --dataset DATASET/CATEGORY --model BUNDLE    any test set
    python benchmarks/search.py --golden FOLDER                              the random models of the golden numbers

Every image is denoised once and compared at every step; the strategies are then simulated on its scores. `guarded`
takes its bound from the bundle; with the golden models from the other images of the case, since there are no more.
`gate` never compares an image whose score is not predicted to pass δ, and searches the others as `guarded` does.
`from the end` is `guarded` without its prediction of where to begin.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from throughput import boards

from cluster.storage import Storage
from glad_core import adaptive
from glad_core.bundle.model import Model, load_bundle
from glad_core.decoding.picture import decode
from glad_core.engine.base import run
from glad_core.engine.engine import Engine
from glad_core.engine.search import expected_crossing, first_crossing, guess_scores, largest_fall, next_comparison
from glad_core.verdict import Request
from pipelines.archive.layouts import read_dataset
from pipelines.demo.boards import DEFECTS
from pipelines.models.find import SMALL_BUNDLE

Curve = list[float]


@dataclass(frozen=True)
class Walked:
    """The step scores of one image down to min_step, without a stop at δ."""

    curve: Curve
    delta: float
    fall: float
    guessed: list[float] | None = None  # None if the bundle cannot predict scores


def walked(model: Model, requests: Sequence[Request]) -> list[Walked]:
    """Every image, compared at every step."""
    s = model.settings
    walk = replace(model, settings=model.settings.model_copy(update={"delta": 1e4, "saff": False}))
    found = {}
    for request, verdict in run(Engine(walk, 8, search="scan"), requests):
        if isinstance(verdict, Exception):
            raise verdict
        guessed = None if s.score_guess is None else guess_scores(verdict.departures, s.score_guess)
        curve = [score for _, score in verdict.steps]
        delta = float(torch.tensor(s.delta).half())
        found[request.image_id] = Walked(curve, delta, s.score_fall or 0.0, guessed)
    return [found[request.image_id] for request in requests]


def play(curve: Curve, choose: Callable[[dict[int, float]], int | None], delta: float) -> tuple[int | None, int]:
    """Index of the stop step, and number of comparisons, of one strategy on one image."""
    scores: dict[int, float] = {}
    while (k := choose(scores)) is not None:
        scores[k] = curve[k]
    return first_crossing(scores, delta), len(scores)


def every_second(size: int, delta: float) -> Callable[[dict[int, float]], int | None]:
    """Every second step from the first on; before a crossing also the step left out."""

    def choose(scores: dict[int, float]) -> int | None:
        crossing = first_crossing(scores, delta)
        if crossing is not None:
            return crossing - 1 if crossing > 0 and crossing - 1 not in scores else None
        steps = [*range(0, size, 2), size - 1]
        return next((k for k in steps if k not in scores), None)

    return choose


def bisection(size: int, delta: float) -> Callable[[dict[int, float]], int | None]:
    """The guarded search with a bound of 0, which assumes that scores only rise."""
    return lambda scores: next_comparison(scores, size, delta, 0.0)


def play_all(images: Sequence[Walked]) -> dict[str, dict[str, Any]]:
    """Agreement and comparisons of every strategy, by whether scan stops the image at δ."""
    table: dict[str, dict[str, Any]] = {}
    for name in ("scan", "guarded", "from the end", "bisection", "every second", "gate"):
        outcomes = []
        for image in images:
            curve, delta, fall, guess, size = image.curve, image.delta, image.fall, image.guessed, len(image.curve)
            if name == "gate" and guess is None:
                continue
            expected, _ = play(curve, lambda s, n=size, d=delta: next_comparison(s, n, d, None), delta)
            choose = {
                "scan": lambda s, n=size, d=delta: next_comparison(s, n, d, None),
                "guarded": lambda s, n=size, d=delta, f=fall, g=guess: next_comparison(s, n, d, f, g),
                "from the end": lambda s, n=size, d=delta, f=fall: next_comparison(s, n, d, f),
                "bisection": bisection(size, delta),
                "every second": every_second(size, delta),
                "gate": lambda s, n=size, d=delta, f=fall, g=guess: (
                    None if expected_crossing({}, g, d) is None else next_comparison(s, n, d, f, g)
                ),
            }[name]
            stop, comparisons = play(curve, choose, delta)
            outcomes.append((expected is not None, stop == expected, comparisons))
        for kind, triggered in (("triggered", True), ("not triggered", False)):
            of_kind = [
                (agrees, comparisons) for is_triggered, agrees, comparisons in outcomes if is_triggered is triggered
            ]
            if of_kind:
                agreement, comparisons = np.mean(of_kind, axis=0)
                table.setdefault(name, {})[kind] = {
                    "images": len(of_kind),
                    "agreement": float(agreement),
                    "comparisons": float(comparisons),
                }
    return table


def golden_images(folder: Path) -> list[Walked]:
    """The images of the golden cases."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    sys.path.insert(0, str(Path(__file__).parents[1]))  # before the tests, whose folders have the same names
    import test_golden as golden

    golden.FOLDER = folder
    images = []
    for name in golden.cases("case_*"):
        case = golden.Case(name)
        delta = case.settings["input_threshold"]
        if delta == 0:
            continue
        model = golden.model_of(case.settings["model_family"], golden.settings_of(case, delta=1e4))
        inputs = (case.tensor(key) for key in ("images", "noise", "enc_noise"))
        of_case = [[score for _, score in steps] for steps in adaptive.reconstruct(model, *inputs).steps]
        for place, curve in enumerate(of_case):
            others = np.array(of_case[:place] + of_case[place + 1 :])
            images.append(Walked(curve, float(torch.tensor(delta).half()), largest_fall(others)))
    return images


@torch.inference_mode()
def main(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
    model: Annotated[Path, typer.Option(help="calibrated bundle")] = SMALL_BUNDLE,
    dataset: Annotated[str | None, typer.Option(help="one category with ground truth")] = None,
    golden: Annotated[Path | None, typer.Option(help="folder of golden numbers")] = None,
    boards_of_a_kind: Annotated[
        int, typer.Option(help="demo boards: number of each kind of defect; four times as many are good")
    ] = 50,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    if golden is not None:
        images = golden_images(golden)
    else:
        loaded = load_bundle(model)
        s = loaded.settings
        if dataset is None:
            requests = boards(s.resolution, [kind for kind in (*DEFECTS, *[None] * 4) for _ in range(boards_of_a_kind)])
        else:
            storage = Storage.from_environment()
            test = [example for example in read_dataset(dataset, storage) if example.split == "test"]
            requests = [Request(e.path, decode(storage.read(e.uri), s.resolution).pixels) for e in test]
        images = walked(loaded, requests)
    table = play_all(images)
    drawn = Table("strategy", "images", "", "same stop step", "comparisons")
    for name, kinds in table.items():
        for kind, figures in kinds.items():
            drawn.add_row(
                name, str(figures["images"]), kind, f"{figures['agreement']:.4f}", f"{figures['comparisons']:.2f}"
            )
    Console(stderr=as_json).print(drawn)
    if as_json:
        print(json.dumps(table))


if __name__ == "__main__":
    typer.run(main)
