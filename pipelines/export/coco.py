"""`glad export --coco`: alarms as instances in the format of COCO, by pycocotools."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from glad_core.errors import GladError
from pipelines.export.images import Judged, Region


class Coco:
    """The file as it grows, an image at a time.

    An outline is a polygon; a region with holes, which COCO's polygons cannot have, is run lengths (RLE).
    """

    def __init__(self, source: str, run: str) -> None:
        try:
            from pycocotools import mask
        except ImportError as error:
            raise GladError("--coco needs pycocotools: pip install 'glad-ray[export]'") from error
        self._mask: Any = mask
        self._categories: dict[str, int] = {}
        self.info = {"description": f"alarms of {run}", "contributor": "glad export", "source": source}
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, image: Judged, left_out: Counter[str]) -> None:
        """Add an image and the regions of its alarm; what is left out is counted."""
        row, (width, height) = image.row, image.size
        number = len(self.images) + 1
        category = self._categories.setdefault(image.category, len(self._categories) + 1)
        entry = {"id": number, "file_name": image.name, "width": width, "height": height, "coco_url": row["uri"]}
        self.images.append(
            entry
            | {"glad_id": row["image_id"], "score": image.score, "threshold": image.threshold}
            | {"is_anomalous": row["is_anomalous"]}
        )
        for region in image.regions:
            shape = self._shape(region, width, height)
            if shape["area"] == 0:
                left_out["regions smaller than a pixel of their picture"] += 1
                continue
            ids = {"id": len(self.annotations) + 1, "image_id": number, "category_id": category, "iscrowd": 0}
            self.annotations.append(ids | shape | {"score": round(region.score, 5)})

    def _shape(self, region: Region, width: int, height: int) -> dict[str, Any]:
        polygons = [ring.round(1).ravel().tolist() for ring in region.rings]
        outer = self._mask.merge(self._mask.frPyObjects(polygons[:1], height, width))
        segmentation: Any = polygons[:1]
        if len(polygons) > 1:
            holes = self._mask.merge(self._mask.frPyObjects(polygons[1:], height, width))
            solid = self._mask.decode(outer) & ~self._mask.decode(holes) & 1
            outer = self._mask.encode(np.asfortranarray(solid))
            segmentation = outer | {"counts": outer["counts"].decode()}
        area, box = self._mask.area(outer), self._mask.toBbox(outer)
        return {"segmentation": segmentation, "area": float(area), "bbox": box.tolist()}

    def finished(self) -> dict[str, Any]:
        """The file's content."""
        categories = [
            {"id": number, "name": name, "supercategory": "anomaly"} for name, number in self._categories.items()
        ]
        return {
            "info": self.info,
            "licenses": [],
            "images": self.images,
            "annotations": self.annotations,
            "categories": categories,
        }
