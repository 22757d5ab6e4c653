"""How good a trained model is, by each way to judge that calibration compares, and whether it chose well.

    python benchmarks/quality.py DATASET --category NAME --work FOLDER [--seed 0] [--only METHOD ...] [--json]

Trains a bundle with `glad train`, scores the test set with `glad score` by the chosen way and by each of the others
through the views it was compared with, and measures with `glad evaluate`. What is in FOLDER is not done again, so the
ways can be measured one after the other. Keys, for each way: i_auroc, p_auroc, pro.

chosen_over_best    image AUROC of the chosen way, divided by the best of all measured

DATASET demo stands for the boards that `glad demo-data` draws, with the category circuit_board.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.storage import Storage
from glad_core.bundle.glad_json import read_description, with_settings
from glad_core.bundle.settings import Settings
from pipelines.models.variant import write_variant

WAYS = {
    "adaptive steps": "adaptive",
    "fixed steps": "fixed",
    "a single step": "single",
    "nearest good patches": "nearest",
}
METRICS = {"I-AUROC": "i_auroc", "P-AUROC": "p_auroc", "PRO": "pro"}


def glad(*words: object) -> str:
    """The output of a command."""
    command = [str(Path(sys.executable).with_name("glad")), *map(str, words)]
    print(" ".join(command), file=sys.stderr, flush=True)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def measure(way: str, bundle: Path, data: Path, folder: Path) -> dict[str, float]:
    """The metrics of one way to judge, from the results in ``folder``/WAY if there are some."""
    found = folder / f"{WAYS[way]}.json"
    if not found.exists():
        description = read_description(bundle)
        facts: Any = description.provenance
        model, more = bundle, []
        if way != facts["method"]:  # else the bundle is as `glad train` made it
            settings = Settings.parse(facts["method_settings"][way], "")
            if settings.method == "nearest":
                # Only the chosen way's patches are in the bundle: they are chosen anew, from all good pictures.
                settings = settings.judged_by("glad")
                more = ["--method", "nearest", "--good", data / "train/good"]
            model = folder / f"{WAYS[way]}-bundle"
            if not model.exists():
                write_variant(str(bundle), with_settings(description, settings, {}), str(model), Storage())
        run = folder / WAYS[way]
        glad("score", data, "--model", model, "--out", run, *more)
        (metrics,) = json.loads(glad("evaluate", run, "--dataset", data, "--json")).values()
        found.write_text(json.dumps({METRICS[name]: metrics[name] for name in METRICS}))
    return json.loads(found.read_text())


def main(
    dataset: Annotated[str, typer.Argument(help="dataset in MVTec-AD's layout, or demo")],
    work: Annotated[Path, typer.Option(help="folder for everything that is made")],
    category: Annotated[str, typer.Option(help="one of its categories")] = "circuit_board",
    seed: Annotated[int, typer.Option(help="of training, anomalies and noise")] = 0,
    only: Annotated[list[str], typer.Option(help="adaptive, fixed, single or nearest; default: all")] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
) -> None:
    """Measure and print."""
    folder = work.resolve() / f"{category}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    if dataset == "demo" and not (work / "demo").exists():
        glad("demo-data", work / "demo")
    data = (work / "demo" if dataset == "demo" else Path(dataset)) / category
    bundle = folder / "bundle"
    if not bundle.exists():
        glad("train", data.parent, "--category", category, "--seed", seed, "--out", bundle)
    facts: Any = read_description(bundle).provenance
    chosen = facts["method"]
    figures: dict[str, Any] = {"category": category, "seed": seed, "chosen": WAYS[chosen]}
    figures["calibration"] = facts["methods"]
    measured = {way: measure(way, bundle, data, folder) for way in WAYS if not only or WAYS[way] in only}
    figures |= {WAYS[way]: metrics for way, metrics in measured.items()}
    if chosen in measured:
        best = max(metrics["i_auroc"] for metrics in measured.values())
        figures["chosen_over_best"] = measured[chosen]["i_auroc"] / best
    print(json.dumps(figures) if as_json else "\n".join(f"{name:20} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    typer.run(main)
