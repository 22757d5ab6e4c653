"""`glad export --label-studio`: alarms as predictions; `glad feedback --label-studio`: what people said of them."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import pyarrow as pa
import pyarrow.dataset as pads

from cluster.storage import absolute, clear_errors
from glad_core.errors import GladError
from pipelines.archive.uris import split_tar_uri
from pipelines.export.images import Judged, Region
from pipelines.runs import feedback
from pipelines.runs.run import Run

CHOICES: dict[str, feedback.Verdict] = {"confirmed": "confirmed", "false alarm": "false_alarm"}
LOCAL = "/data/local-files/?d="  # where Label Studio serves files of its own machine


def task(image: Judged, left_out: Counter[str]) -> dict[str, Any]:
    """An image as a task whose prediction are the regions of its alarm; what Label Studio cannot show is counted."""
    row = image.row
    is_file = split_tar_uri(row["uri"]) is None and "-" not in row["image_id"]  # else in a tar, or a further page
    location = absolute(row["uri"]) if is_file else row["uri"]
    left_out["pictures in tars, or further pages of a file, which Label Studio cannot show"] += not is_file
    left_out["regions whose holes Label Studio shows filled"] += sum(len(region.rings) > 1 for region in image.regions)
    data = {
        "image": LOCAL + quote(os.fsencode(location).lstrip(b"/")) if location.startswith("/") else location,
        "image_id": row["image_id"],
        "uri": row["uri"],
        "category": image.category,
        "score": image.score,
        "threshold": image.threshold,
    }
    result = [_polygon(image, region, number) for number, region in enumerate(image.regions)]
    return {
        "data": data,
        "predictions": [{"model_version": row["model_id"], "score": _share(image, image.score), "result": result}],
    }


def _polygon(image: Judged, region: Region, number: int) -> dict[str, Any]:
    points = (region.rings[0] * 100 / image.size).round(3).tolist()
    width, height = image.size
    return {
        "id": f"{image.row['image_id']}-{number}",
        "from_name": "defect",
        "to_name": "image",
        "type": "polygonlabels",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "score": _share(image, region.score),
        "value": {"points": points, "closed": True, "polygonlabels": [image.category]},
    }


def _share(image: Judged, score: float | None) -> float | None:
    """A score from 0 to 1, as Label Studio wants predictions': 0.5 at the threshold, 0.67 at twice the threshold.

    None if twice the threshold means nothing.
    """
    threshold = image.threshold
    if score is None or threshold is None or threshold <= 0 or image.is_standardised:
        return None
    return round(max(score, 0.0) / (max(score, 0.0) + threshold), 5)


def labels(categories: set[str]) -> str:
    """The labelling interface that fits the tasks: the regions, and a choice for the whole picture."""
    names = "".join(f"    <Label value={quoteattr(name)}/>\n" for name in sorted(categories))
    choices = "".join(f"    <Choice value={quoteattr(name)}/>\n" for name in CHOICES)
    return (
        '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
        f'  <PolygonLabels name="defect" toName="image">\n{names}  </PolygonLabels>\n'
        f'  <Choices name="verdict" toName="image" showInLine="true">\n{choices}  </Choices>\n</View>\n'
    )


def read_feedback(run: Run, file: str) -> dict[str, Any]:
    """Keep what people chose in Label Studio as marks of the run; the latest annotation of an image holds.

    Args:
        file: Label Studio's export, JSON or JSON-MIN, local or s3://.

    Returns:
        The number ``kept``, and what was left out (``left_out``), by reason.

    Raises:
        GladError, StorageError: no finished run, or no such export.
    """
    results = run.results()
    left_out: Counter[str] = Counter()
    chosen: dict[str, tuple[str, feedback.Verdict]] = {}
    for entry in _tasks(run, file):
        image_id, answers = _answers(entry, left_out)
        for when, verdict in answers:
            if image_id in chosen and chosen[image_id][1] != verdict:
                left_out["choices that a later one contradicts"] += 1
            chosen[image_id] = max(chosen.get(image_id, ("", verdict)), (when, verdict), key=lambda answer: answer[0])
    columns = [name for name in feedback.SCHEMA.names if name in results.schema.names]
    with clear_errors(run.location, run.storage):
        rows = results.to_table(columns=columns, filter=pads.field("image_id").isin(pa.array(chosen, pa.string())))
    notes = {mark["image_id"]: mark["note"] or "" for mark in feedback.read_marks(run)}
    for row in rows.to_pylist():
        feedback.mark(run, row, chosen[row["image_id"]][1], notes.get(row["image_id"], ""))
    if len(chosen) > len(rows):
        left_out["choices of images that are not in this run"] += len(chosen) - len(rows)
    return {"kept": len(rows), "left_out": dict(left_out)}


def _tasks(run: Run, file: str) -> list[Any]:
    wrong = f"{file}: no export of Label Studio; choose JSON or JSON-MIN there, under Export"
    try:
        with clear_errors(file, run.storage):
            content = json.loads(run.storage.read(absolute(file)))
    except (ValueError, RecursionError) as error:
        raise GladError(wrong) from error
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise GladError(wrong)
    return content


def _answers(entry: dict[str, Any], left_out: Counter[str]) -> tuple[str, list[tuple[str, feedback.Verdict]]]:
    """The image of a task, and the choices made for it, each with its time."""
    data = entry.get("data", entry)
    image_id = data.get("image_id") if isinstance(data, dict) else None
    if not isinstance(image_id, str) or not image_id.isascii():
        left_out["tasks without image_id, which `glad export` did not write"] += 1
        return "", []
    annotations = entry.get("annotations", [entry])
    found = []
    for annotation in annotations if isinstance(annotations, list) else [None]:
        if not isinstance(annotation, dict) or annotation.get("was_cancelled"):
            left_out["annotations that were skipped"] += 1
            continue
        choices = _choices(annotation)
        if len(choices) != 1 or choices[0] not in CHOICES:
            left_out["annotations without the choice of confirmed or false alarm"] += 1
            continue
        found.append((str(annotation.get("updated_at") or annotation.get("created_at") or ""), CHOICES[choices[0]]))
    if not annotations:
        left_out["tasks that nobody has annotated"] += 1
    return image_id, found


def _choices(annotation: dict[str, Any]) -> list[str]:
    """What was chosen: in JSON among the results of the annotation, in JSON-MIN under the name of the control."""
    if "result" in annotation:
        results = annotation["result"] if isinstance(annotation["result"], list) else []
        values = [item.get("value") for item in results if isinstance(item, dict) and item.get("type") == "choices"]
    else:
        values = [annotation.get("verdict")]
    lists = [value.get("choices") if isinstance(value, dict) else value for value in values]
    return [str(choice) for found in lists for choice in (found if isinstance(found, list) else [found])]
