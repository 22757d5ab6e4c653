"""The jobs a user runs, one file per job. For Python: ``Run`` reads results, ``pretrained`` finds models anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.models.find import pretrained as pretrained
    from pipelines.runs.run import Run as Run


def __getattr__(name: str) -> Any:
    """``Run`` and ``pretrained``, imported when they are used, so that `glad --help` is quick."""
    if name == "Run":
        from pipelines.runs.run import Run

        return Run
    if name == "pretrained":
        from pipelines.models.find import pretrained

        return pretrained
    raise AttributeError(f"module 'pipelines' has no attribute '{name}'")
