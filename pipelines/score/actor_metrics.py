"""What an actor counts, as metrics of Ray; `cluster/grafana/glad.json` draws them."""

from __future__ import annotations

from typing import Any

STOP_STEPS = [float(step) for step in range(50, 1000, 50)]  # boundaries of the stop-step histogram
SECONDS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]


class ActorMetrics:
    """Counts images, stop steps and seconds of one run in one actor."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        tags = ("run", "category", "verdict")
        self.tags = {"run": run}
        self.images = Counter("glad_images", "Images judged: good, anomalous, unjudged (no threshold), error", tags)
        self.stop_step = Histogram("glad_stop_step", "Adaptive step of an image", STOP_STEPS, ("run", "category"))
        self.seconds = Histogram("glad_image_seconds", "Model time of an image", SECONDS, ("run",))
        self.occupancy = Gauge("glad_slot_occupancy", "Share of slots that held an image while others waited", ("run",))

    def count(self, row: dict[str, Any]) -> None:
        """Count one row of the results or errors."""
        category = {"category": row.get("category") or ""}
        verdict = {None: "unjudged", True: "anomalous", False: "good"}[row.get("is_anomalous")]
        verdict = "error" if row.get("error_type") else verdict
        self.images.inc(1, self.tags | category | {"verdict": verdict})
        if row.get("stop_step") is not None:
            self.stop_step.observe(row["stop_step"], self.tags | category)
        if row.get("seconds"):
            self.seconds.observe(row["seconds"], self.tags)

    def set_occupancy(self, engines: list[float]) -> None:
        """Record the mean of the engines' slot occupancies, if there are engines."""
        if engines:
            self.occupancy.set(sum(engines) / len(engines), self.tags)
