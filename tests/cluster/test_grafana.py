"""The Grafana dashboard and the actors agree on metrics and labels."""

import json
import re
from pathlib import Path

from pipelines.score.actor_metrics import ActorMetrics

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "glad.json"


def test_the_dashboard_shows_every_metric_of_the_actors_by_labels_it_has():
    metrics = {
        metric.info["name"]: set(metric.info["tag_keys"])
        for metric in vars(ActorMetrics("r")).values()
        if hasattr(metric, "info")
    }
    panels = json.loads(DASHBOARD.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    shown = re.findall(r"ray_(glad_\w+)", " ".join(expressions))
    names = {name: re.sub(r"_(total|bucket)$", "", name) for name in shown}
    assert set(names.values()) == set(metrics)  # and none goes unseen
    for expression in expressions:
        (name,) = set(re.findall(r"ray_(glad_\w+)", expression))
        labels = set(re.findall(r"(\w+)=~?\"", expression))
        assert labels <= metrics[names[name]], expression
    assert len({panel["id"] for panel in panels}) == len(panels)
