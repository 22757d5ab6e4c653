"""Cards: the contour and the colours follow the threshold, pictures fit their bytes, lost sources leave a reason."""

import base64
import io
import re

import numpy as np
import pytest
from judged_run import make_judged_run
from PIL import Image

from cluster.storage import StorageError
from pipelines.report.cards import MAP_SIDE, HeatScale, _beyond, contour, make_card, webp


def picture(uri: str) -> Image.Image:
    head, data = uri.split(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_contour_and_colours_follow_the_threshold() -> None:
    anomaly_map = np.zeros((41, 41), np.float32)
    anomaly_map[10:31, 20:] = 2.0  # up to the right border
    numbers = [float(number) for number in re.findall(r"[\d.]+", contour(anomaly_map, 1.0, 10_000))]
    x, y = numbers[::2], numbers[1::2]
    assert min(x) == pytest.approx(100 * 19.5 / 40, abs=0.1)
    assert max(x) == 100
    assert (min(y), max(y)) == (pytest.approx(100 * 9.5 / 40, abs=0.1), pytest.approx(100 * 30.5 / 40, abs=0.1))
    assert contour(anomaly_map, 3.0, 10_000) == ""
    assert contour(anomaly_map, None, 10_000) == ""
    scale = HeatScale.of(np.linspace(0, 5, 100), 1.0)
    alpha = scale.colours(np.array([0.0, 0.5, 1.0, 5.0]))[:, 3]
    assert alpha[0] == alpha[1] == 0 < alpha[2] <= alpha[3]


def test_a_contour_without_room_keeps_its_longest_piece() -> None:
    anomaly_map = np.zeros((41, 41), np.float32)
    anomaly_map[5:30, 5:30] = anomaly_map[36, 36] = 2.0
    whole = contour(anomaly_map, 1.0, 100_000)
    assert whole.count("M") == 2
    assert contour(anomaly_map, 1.0, len(whole) - 1) == whole[: whole.rindex("M")]


@pytest.mark.parametrize(
    ("threshold", "standardised", "expected"),
    [
        (1.0, False, (1.5, 1.5, "1.5 × threshold")),
        (1.0, True, (1.5, None, "0.5 spreads above threshold")),
        (0.01, True, (2.49, None, "1.5 spreads above threshold")),
        (-1.0, True, (3.5, None, "2.5 spreads above threshold")),
        (2.0, True, (0.5, None, "0.5 spreads below threshold")),
        (0.0, False, (2.5, None, "1.5 above threshold")),
        (None, True, (1.5, None, "")),
    ],
)
def test_what_a_score_is_compared_with(threshold, standardised, expected) -> None:
    assert tuple(_beyond(1.5, threshold, standardised).values()) == expected


def test_a_picture_is_made_to_fit() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8))
    assert len(webp(noise, 20_000)) < 20_000 * 4 / 3 + 40
    assert len(webp(noise, 1_000_000)) > 30_000


def test_a_card_shows_its_page(tmp_path, tiny_bundle) -> None:
    run, _, rows = make_judged_run(tmp_path, tiny_bundle)
    frames = [Image.new("RGB", (60, 40), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "stack.tif", save_all=True, append_images=frames[1:])
    source = {"uri": str(tmp_path / "stack.tif"), "size": None}
    for page, colour in ((None, (255, 0, 0)), (2, (0, 0, 255))):
        card = make_card(run, rows[0], source | {"page": page}, HeatScale(0.5, 3.0), 100_000)
        assert card["p"] == rows[0]["p_value"] == 0.5
        assert np.abs(np.subtract(picture(card["input"]).convert("RGB").getpixel((9, 9)), colour)).max() < 5


def test_a_card_shows_the_result_or_why_its_source_is_lost(tmp_path, tiny_bundle, monkeypatch) -> None:
    run, _, rows = make_judged_run(tmp_path, tiny_bundle)
    manifest = run.manifest_rows([row["image_id"] for row in rows])
    row, overwritten = rows[0], rows[-1]
    scale = HeatScale(0.5, 3.0)
    card = make_card(run, row, manifest[row["image_id"]], scale, 100_000)
    assert (card["score"], card["anomalous"]) == (pytest.approx(row["score"], rel=1e-4), row["is_anomalous"])
    assert card["margin"] == pytest.approx(row["score"] / row["threshold"], rel=1e-4)
    assert card["delta"] == 0.0042  # of the bundle
    assert card["problem"] is None
    assert picture(card["heat"]).size == (min(32, MAP_SIDE),) * 2
    assert picture(card["reconstruction"]).width == 60
    lost = make_card(run, overwritten, manifest[overwritten["image_id"]], scale, 100_000)
    assert lost["input"] is None
    assert lost["problem"].startswith("not_an_image: ")
    assert make_card(run, row, None, scale, 100_000)["problem"] == "missing: not in the manifest"

    def away(storage, row):
        raise StorageError("s3://a/b.png: cannot reach http://s3")

    monkeypatch.setattr("pipelines.report.cards.fetch", away)
    assert make_card(run, row, manifest[row["image_id"]], scale, 100_000)["problem"].startswith("s3://a/b.png: cannot")
