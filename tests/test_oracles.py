"""The oracles against their definitions, by counting; the released code's own numbers are held in test_golden.py."""

import math
from collections import deque
from itertools import pairwise

import numpy as np
import pytest
from oracles import auroc_by_pairs, f1_and_ap_by_counting, pixel_metrics, pro


def regions_by_flooding(mask) -> list[list[tuple[int, int]]]:
    left, found = set(zip(*map(list, np.nonzero(mask)), strict=True)), []
    while left:
        queue, region = deque([left.pop()]), []
        while queue:
            y, x = queue.popleft()
            region.append((y, x))
            for near in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if near in left:
                    left.remove(near)
                    queue.append(near)
        found.append(region)
    return found


def pro_by_counting(maps, masks) -> float:
    regions = [(image, region) for image, mask in zip(maps, masks, strict=True) for region in regions_by_flooding(mask)]
    points = []
    for level in np.arange(maps.min(), maps.max(), (maps.max() - maps.min()) / 200):
        rate = (maps > level)[masks == 0].mean()
        overlap = np.mean([np.mean([image[place] > level for place in region]) for image, region in regions])
        if rate < 0.3:
            points.append((rate, overlap))
    largest = max(rate for rate, _ in points)
    return sum((a[0] - b[0]) / largest * (a[1] + b[1]) / 2 for a, b in pairwise(points))


def scene(seed: int, ties: bool):
    rng = np.random.default_rng(seed)
    masks = (rng.random((4, 14, 17)) > 0.9).astype(np.uint8)  # many regions, some joined by a corner alone
    masks[0] = 0
    maps = rng.random(masks.shape) + 0.6 * masks
    return (np.round(maps, 1) if ties else maps), masks


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_pixel_metrics_against_counting(seed: int, ties: bool) -> None:
    maps, masks = scene(seed, ties)
    got = pixel_metrics(maps, masks)
    f1, ap = f1_and_ap_by_counting(maps.ravel(), masks.ravel())
    assert got["P-AUROC"] == pytest.approx(auroc_by_pairs(maps.ravel(), masks.ravel()), abs=1e-12)
    assert got["P-F1max"] == pytest.approx(f1, abs=1e-12)
    assert got["P-AP"] == pytest.approx(ap, abs=1e-12)
    assert got["PRO"] == pytest.approx(pro_by_counting(maps, masks), abs=1e-12)


def test_regions_touching_by_a_corner_are_one() -> None:
    mask = np.zeros((1, 8, 8), np.uint8)
    mask[0, 1, 1] = mask[0, 2, 2] = mask[0, 2, 3] = 1
    maps = np.linspace(0, 0.5, 64).reshape(1, 8, 8)
    maps[0, 1, 1] = 1.0  # a third of the one region is found at once; of two regions it would be half of them
    low_false_alarms = pro(maps, mask, limit=0.05)
    assert low_false_alarms == pytest.approx(1 / 3, abs=1e-9)


def test_a_pixel_at_the_threshold_does_not_count() -> None:
    rng = np.random.default_rng(5)
    masks = scene(1, False)[1]
    maps = rng.integers(0, 240, masks.shape) / 2 + 80.0 * masks
    maps[0, 0, :2] = [0, 200]  # spread 200: the thresholds are 0, 1, 2, ... and halves lie between them
    assert pro(maps, masks) == pytest.approx(pro_by_counting(maps, masks), abs=1e-12)


def test_perfect_map() -> None:
    masks = scene(0, False)[1]
    values = pixel_metrics(masks.astype(np.float32) + np.random.default_rng(0).random(masks.shape) * 0.1, masks)
    assert values == pytest.approx({"P-AUROC": 1, "P-AP": 1, "P-F1max": 1, "PRO": 1}, abs=1e-12)


def test_pro_where_there_is_nothing_to_count() -> None:
    maps, masks = scene(0, False)
    assert math.isnan(pro(maps, np.zeros_like(masks)))
    assert math.isnan(pro(maps, np.ones_like(masks)))
    assert pro(np.ones_like(maps), masks) == 0
