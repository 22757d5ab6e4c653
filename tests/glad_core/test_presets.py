import pytest

from glad_core import presets
from glad_core.errors import GladError
from glad_core.settings import Settings


def test_every_published_category_makes_valid_settings() -> None:
    counts = {name: len(dataset["categories"]) for name, dataset in presets.table()["datasets"].items()}
    assert counts == {"MVTec-AD": 15, "MPDD": 6, "VisA": 12, "PCB-Bank": 7}
    for name, dataset in presets.table()["datasets"].items():
        for category in dataset["categories"]:
            Settings(**presets.preset(name, category))


def test_published_values() -> None:
    screw = presets.preset("MVTec-AD", "screw")
    assert (screw["start_step"], screw["delta"], screw["foreground_mode"]) == (750, 0.32, 1)
    assert presets.preset("VisA", "pcb1")["bidirectional"]
    assert presets.preset("VisA", "pcb1")["noise_index"] == "T-1"


def test_unknown_category_names_the_nearest() -> None:
    with pytest.raises(GladError, match="did you mean 'screw'"):
        presets.preset("MVTec-AD", "scrw")
