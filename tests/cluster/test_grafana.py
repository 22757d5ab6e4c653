"""The Grafana dashboard asks for metrics that the actors give."""

import json
import re
from pathlib import Path

from pipelines.score.actor_metrics import ActorMetrics

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "glad.json"


def test_every_metric_of_the_dashboard_is_one_the_actors_count_with_the_labels_asked_for():
    metrics = {
        metric.info["name"]: set(metric.info["tag_keys"])
        for metric in vars(ActorMetrics("r")).values()
        if hasattr(metric, "info")
    }
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    names = {name: re.sub(r"_(total|bucket)$", "", name) for name in re.findall(r"ray_(glad_\w+)", " ".join(asked))}
    assert set(names.values()) == set(metrics)  # and none goes unseen
    for expression in asked:
        (name,) = set(re.findall(r"ray_(glad_\w+)", expression))
        labels = set(re.findall(r"(\w+)=~?\"", expression))
        assert labels <= metrics[names[name]], expression
    assert len({panel["id"] for panel in panels}) == len(panels)
