import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import pro
from scipy import ndimage
from sklearn import metrics as sk

from glad_core.pixel_metrics import PixelCounts, area_up_to, key_values, keys, merged


def scene(seed: int, images: int = 6, side: int = 24, levels: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Float16 maps [N, H, W], a little higher in the anomalous regions of every other image, and masks."""
    rng = np.random.default_rng(seed)
    maps = rng.random((images, side, side)) * 2
    masks = np.zeros((images, side, side), bool)
    for image in range(0, images, 2):
        for _ in range(rng.integers(1, 4)):
            y, x, h, w = rng.integers(0, side - 6, 2).tolist() + rng.integers(1, 6, 2).tolist()
            masks[image, y : y + h, x : x + w] = True
    maps = maps + masks * rng.random() * 2
    if levels:
        maps = np.round(maps * levels) / levels
    return maps.astype(np.float16), masks


def counted(maps: np.ndarray, masks: np.ndarray) -> PixelCounts:
    counts = PixelCounts()
    for image, mask in zip(maps, masks, strict=True):
        counts.add(image, mask)
    return counts


def test_keys_rise_with_their_values() -> None:
    values = np.array([-np.inf, -3.5, -1e-7, -0.0, 0.0, 6e-8, 0.1, 1.0, 65504, np.inf], np.float16)
    codes = keys(values).astype(int)
    assert (np.diff(codes) >= 0).all()
    assert codes[3] == codes[4]
    assert np.array_equal(key_values()[codes], values)
    with pytest.raises(ValueError, match="NaN"):
        keys(np.array([np.nan], np.float16))


@pytest.mark.parametrize(("seed", "levels"), list(itertools.product(range(4), (None, 8))))
def test_counts_give_what_scikit_learn_gives_on_the_same_maps(seed: int, levels: int | None) -> None:
    maps, masks = scene(seed, levels=levels)
    got = counted(maps, masks).metrics()
    scores, labels = maps.astype(np.float64).ravel(), masks.ravel()
    precision, recall, _ = sk.precision_recall_curve(labels, scores)
    assert got["P-AUROC"] == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-9)
    assert got["P-AP"] == pytest.approx(sk.average_precision_score(labels, scores), abs=1e-9)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    assert got["P-F1max"] == pytest.approx(f1.max(), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limit", [0.3, 0.05])
def test_pro_against_every_threshold_in_turn(seed: int, limit: float) -> None:
    maps, masks = scene(seed, levels=8)
    regions = []
    for image, mask in zip(maps, masks, strict=True):
        labelled, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [image[labelled == number] for number in range(1, count + 1)]
    points = [(0.0, 0.0)]
    for level in np.unique(maps)[::-1]:
        overlap = np.mean([(region >= level).mean() for region in regions])
        points.append(((maps[~masks] >= level).mean(), overlap))
    fpr, pro = np.array(points).T
    fine = np.linspace(0, limit, 200_001)
    expected = np.trapezoid(np.interp(fine, fpr, pro), fine) / limit
    assert counted(maps, masks).metrics(limit)["PRO"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_200_thresholds_are_the_released_code_s(seed: int) -> None:
    maps, masks = scene(seed)
    expected = pro(maps.astype(np.float64), masks)
    assert counted(maps, masks).pro_200() == pytest.approx(expected, abs=1e-8)


def test_aupimo_against_the_curve_of_one_image() -> None:
    rng = np.random.default_rng(0)
    good = np.abs(rng.normal(size=(8, 200, 200))).astype(np.float16)
    mask = np.zeros((200, 200), bool)
    mask[:20, :20] = True

    def aupimo(values: np.ndarray) -> tuple[float, np.ndarray]:
        bad = np.zeros((200, 200), np.float16)
        bad[mask] = values
        masks = np.concatenate([np.zeros_like(good, bool), mask[None]])
        return counted(np.concatenate([good, bad[None]]), masks).metrics()["AUPIMO"], bad[mask]

    got, inside = aupimo(rng.uniform(3.5, 5, 400))
    levels = np.unique(np.concatenate([good.ravel(), inside]))[::-1]
    fpr = np.array([0, *(1 - np.searchsorted(np.sort(good.ravel()), levels) / good.size)])  # share of values >= level
    recall = np.array([0, *((inside >= level).mean() for level in levels)])
    fine = np.geomspace(1e-5, 1e-4, 100_001)
    held = recall[np.searchsorted(fpr, fine, side="right") - 1]
    # Between two rates met the one curve is a step and the other a line.
    assert got == pytest.approx(np.trapezoid(held, np.log(fine)) / np.log(10), abs=0.02)
    assert 0.3 < got < 0.9
    assert aupimo(np.full(400, 9.0))[0] == pytest.approx(1)
    assert aupimo(np.full(400, 0.1))[0] == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 7), st.randoms())
def test_any_split_in_any_order_gives_the_very_same_numbers(seed: int, shards: int, random) -> None:
    maps, masks = scene(seed, images=9)
    whole = counted(maps, masks)
    order = list(range(9))
    random.shuffle(order)
    parts = [counted(maps[order[start::shards]], masks[order[start::shards]]) for start in range(shards)]
    random.shuffle(parts)
    assert merged(parts).metrics() == whole.metrics()
    assert merged(parts).pro_200() == whole.pro_200()


def test_nothing_to_find_is_nan_and_a_wrong_mask_is_refused() -> None:
    counts = PixelCounts()
    counts.add(np.ones((4, 4), np.float16), None)
    assert all(np.isnan(value) for value in counts.metrics().values())
    with pytest.raises(ValueError, match="mask"):
        counts.add(np.ones((4, 4), np.float16), np.ones((5, 5)))


def test_the_area_is_cut_at_the_limit() -> None:
    x, y = np.array([0, 0.2, 0.6, 1.0]), np.array([0, 0.4, 0.8, 1.0])
    assert area_up_to(x, y, 0.4) == pytest.approx((0.2 * 0.4 / 2 + 0.2 * (0.4 + 0.6) / 2) / 0.4)
    assert area_up_to(x, y, 1.0) == pytest.approx(np.trapezoid(y, x))
