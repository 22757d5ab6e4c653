"""GLAD: global and local adaptive diffusion for unsupervised anomaly detection (Yao et al., ECCV 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glad_core.detector import Detector as Detector
    from glad_core.detector import Verdict as Verdict

    __version__: str


def __getattr__(name: str) -> Any:
    """``Detector``, ``Verdict`` and ``__version__``, imported when they are used: PyTorch takes seconds."""
    if name == "__version__":
        from glad_core.bundle.glad_json import versions

        return versions("glad-ray")["glad-ray"]
    if name in ("Detector", "Verdict"):
        from glad_core import detector

        return getattr(detector, name)
    raise AttributeError(f"module 'glad_core' has no attribute '{name}'")
