"""Pixel metrics of any number of float16 maps: exact, in one pass, in bounded memory, mergeable.

A float16 map has 65,536 possible values, and the metrics follow from how often each occurs. Counts are integers, and
shares of a region are integers in units of 2^-44, so parts can be added in any order with exactly the same result.

Shapes: H W map, K = 65,536 values in rising order, T points of a curve from the highest value down.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

VALUES = 1 << 16
SHARE = 1 << 44  # of one whole region or image; a share is rounded by at most 2^-45, 1e-8 over a region of 2^18 pixels
EIGHT_NEIGHBOURS = np.ones((3, 3))
PIMO_RANGE = (1e-5, 1e-4)  # false positive rates of AUPIMO (Bertoldo et al., 2024)


@dataclass
class PixelCounts:
    """Counts of the images added so far. Arrays are int64 [K], indexed by `keys`.

    ``normal`` and ``anomalous`` count pixels outside and inside the masks. ``region_shares`` sums, over the anomalous
    regions (8-connected), the share of a region's pixels at each value; ``good_shares`` the same over the good images.
    ``anomalies`` holds the values under the mask of each anomalous image, as (keys, counts).
    """

    normal: np.ndarray = field(default_factory=lambda: np.zeros(VALUES, np.int64))
    anomalous: np.ndarray = field(default_factory=lambda: np.zeros(VALUES, np.int64))
    region_shares: np.ndarray = field(default_factory=lambda: np.zeros(VALUES, np.int64))
    good_shares: np.ndarray = field(default_factory=lambda: np.zeros(VALUES, np.int64))
    regions: int = 0
    good_images: int = 0
    anomalies: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def add(self, map_HW: np.ndarray, mask_HW: np.ndarray | None) -> None:
        """Count one image.

        Args:
            map_HW: float16; other floats are rounded to it.
            mask_HW: > 0 where anomalous, at the map's size; None for a good image.

        Raises:
            ValueError: the mask has another size, or the map holds NaN.
        """
        codes = keys(map_HW)
        mask = np.zeros(codes.shape, bool) if mask_HW is None else np.asarray(mask_HW) > 0
        if mask.shape != codes.shape:
            raise ValueError(f"the mask is {mask.shape}, the map {codes.shape}")
        counts = np.bincount(codes.ravel(), minlength=VALUES)
        if not mask.any():
            self.normal += counts
            self.good_shares += counts * (SHARE // codes.size)
            self.good_images += 1
            return
        inside = np.bincount(codes[mask], minlength=VALUES)
        self.normal += counts - inside
        self.anomalous += inside
        present = np.flatnonzero(inside)
        self.anomalies.append((present.astype(np.uint16), inside[present].astype(np.int32)))
        labelled, regions = ndimage.label(mask, structure=EIGHT_NEIGHBOURS)
        for number, box in enumerate(ndimage.find_objects(labelled), start=1):
            values = codes[box][labelled[box] == number]
            present, counts = np.unique(values, return_counts=True)
            self.region_shares[present] += counts * (SHARE // len(values))
        self.regions += regions

    def merge(self, other: PixelCounts) -> PixelCounts:
        """The counts of both."""
        return PixelCounts(
            self.normal + other.normal,
            self.anomalous + other.anomalous,
            self.region_shares + other.region_shares,
            self.good_shares + other.good_shares,
            self.regions + other.regions,
            self.good_images + other.good_images,
            [*self.anomalies, *other.anomalies],
        )

    def metrics(self, pro_limit: float = 0.3) -> dict[str, float]:
        """P-AUROC, P-AP, P-F1-max, PRO up to a false positive rate of ``pro_limit``, AUPIMO; NaN where undefined."""
        nan = float("nan")
        if not self.anomalous.any() or not self.normal.any():
            return dict.fromkeys(("P-AUROC", "P-AP", "P-F1max", "PRO", "AUPIMO"), nan)
        false, true, shares = self._totals_above()
        fpr, tpr, pro = false / false[-1], true / true[-1], shares / (self.regions * SHARE)
        precision = true[1:] / (true[1:] + false[1:])
        f1 = 2 * true[1:] / (true[1:] + false[1:] + true[-1])
        return {
            "P-AUROC": float(np.trapezoid(tpr, fpr)),
            "P-AP": float(np.sum(np.diff(tpr) * precision)),
            "P-F1max": float(f1.max()),
            "PRO": area_up_to(fpr, pro, pro_limit),
            "AUPIMO": self._aupimo(),
        }

    def pro_curve(self) -> tuple[np.ndarray, np.ndarray]:
        """False positive rate and mean overlap of the regions, [T] each, from the highest value down; [0] if undefined.

        PRO is the area below it.
        """
        if not self.anomalous.any() or not self.normal.any():
            return np.empty(0), np.empty(0)
        false, _, shares = self._totals_above()
        return false / false[-1], shares / (self.regions * SHARE)

    def _totals_above(self) -> tuple[np.ndarray, ...]:
        """Normal pixels, anomalous pixels and shares of regions at or above each value that occurs, [T] each."""
        seen = (self.normal + self.anomalous) > 0
        return tuple(_from_above(part[seen]) for part in (self.normal, self.anomalous, self.region_shares))

    def pro_200(self, limit: float = 0.3, thresholds: int = 200) -> float:
        """PRO as the released code counts it, from ``thresholds`` even levels (`pro` in tests/oracles.py)."""
        seen = np.flatnonzero(self.normal + self.anomalous)
        if not self.regions or not self.normal.any():
            return float("nan")
        values = key_values()
        low, high = float(values[seen[0]]), float(values[seen[-1]])
        if low == high:
            return 0.0
        levels = np.arange(low, high, (high - low) / thresholds)
        first_above = np.searchsorted(values[seen].astype(np.float64), levels, side="right")
        rate, overlap = (
            np.append(np.cumsum(part[seen][::-1])[::-1], 0)[first_above] / total
            for part, total in ((self.normal, self.normal.sum()), (self.region_shares, self.regions * SHARE))
        )
        kept = rate < limit
        if not kept.any() or rate[kept].max() == 0:
            return 0.0
        return float(np.trapezoid(overlap[kept][::-1], (rate[kept] / rate[kept].max())[::-1]))

    def _aupimo(self) -> float:
        """Mean over anomalous images of the area below their recall against the log of the false positive rate.

        The rate is the mean over the good images; without a good image AUPIMO is undefined.
        """
        if not self.good_images or not self.anomalies:
            return float("nan")
        at_or_above = np.append(np.cumsum(self.good_shares[::-1])[::-1], 0)
        rate = at_or_above / (self.good_images * SHARE)
        low, high = PIMO_RANGE
        inside = np.flatnonzero((rate >= low) & (rate <= high))
        # The rates that occur between the ends, highest value first, and the ends themselves.
        fpr = np.concatenate([[low], rate[inside][::-1], [high]])
        thresholds = np.concatenate([[_first(rate, low)], inside[::-1], [_first(rate, high)]])
        areas = []
        for present, counts in self.anomalies:
            above = np.append(np.cumsum(counts[::-1])[::-1], 0)
            recall = above[np.searchsorted(present.astype(np.int64), thresholds)] / above[0]
            areas.append(np.trapezoid(recall, np.log(fpr)) / np.log(high / low))
        return float(np.mean(np.sort(areas)))  # sorted: the order of the images must not change the sum


def merged(parts: Iterable[PixelCounts]) -> PixelCounts:
    """The counts of all parts."""
    total = PixelCounts()
    for part in parts:
        total = total.merge(part)
    return total


def keys(map_HW: np.ndarray) -> np.ndarray:
    """float16 values as uint16 in the same order.

    Raises:
        ValueError: the map holds NaN.
    """
    half = np.asarray(map_HW, dtype=np.float16) + np.float16(0)  # -0.0 becomes 0.0
    if np.isnan(half).any():
        raise ValueError("the map holds NaN")
    bits = half.view(np.uint16)
    return np.where(bits & 0x8000, ~bits, bits | 0x8000)


def key_values() -> np.ndarray:
    """The float16 value of every key, [K]; the keys at both ends stand for NaN and are not used."""
    codes = np.arange(VALUES, dtype=np.uint16)
    return np.where(codes & 0x8000, codes & 0x7FFF, ~codes).astype(np.uint16).view(np.float16)


def area_up_to(x: np.ndarray, y: np.ndarray, limit: float) -> float:
    """Area below a curve from 0 to ``limit``, divided by ``limit``; the curve is cut by linear interpolation."""
    end = int(np.searchsorted(x, limit, side="right"))
    if end == len(x):
        return float(np.trapezoid(y, x) + (limit - x[-1]) * y[-1]) / limit
    y_cut = y[end - 1] + (y[end] - y[end - 1]) * (limit - x[end - 1]) / (x[end] - x[end - 1])
    return float(np.trapezoid(np.append(y[:end], y_cut), np.append(x[:end], limit)) / limit)


def _from_above(counts: np.ndarray) -> np.ndarray:
    """How many lie at or above each value, from the highest value down; the first is 0, above all values."""
    return np.concatenate([[0], np.cumsum(counts[::-1])]).astype(np.float64)


def _first(rate: np.ndarray, limit: float) -> int:
    """The lowest value whose rate is not above ``limit``."""
    return int(np.argmax(rate <= limit))
