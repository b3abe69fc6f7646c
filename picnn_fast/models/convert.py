"""Checkpoints of the authors' own code as ours, by the names of their layers."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Layers of the published PICNN: torchvision's ResNet as an nn.Sequential, the inserted convolution
# behind it, the classifier, and the matrix; to the names that make_interpretable gives them.
_PICNN = {
    r"backbone\.0\.": "features.0.conv1.",
    r"backbone\.1\.": "features.0.bn1.",
    r"backbone\.4\.": "features.0.layer1.",
    r"backbone\.5\.": "features.0.layer2.",
    r"backbone\.6\.": "features.0.layer3.",
    r"backbone\.7\.": "features.0.layer4.",
    r"backbone\.8\.": "features.1.",
    r"classifier\.1\.1\.": "head.2.",
    r"correlation$": "correspondence.weight",
}


def published_picnn(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """State dict of a ``PICNN`` on a ResNet from a checkpoint of spdj2271/PICNN.

    It loads into ``make_interpretable("resnet18", "picnn", num_classes=K, num_filters=N,
    inserted_activation="none")``, which then gives the same logits: no activation follows the
    inserted convolution there.

    Args:
        checkpoint: with the network's state dict under "model", as their training writes it.

    Returns:
        The same tensors under our names; the matrix ``correspondence.weight`` is ``[K, N]``.

    Raises:
        ValueError: no such checkpoint; the message names what it holds or lacks.

    Example:
        >>> import torch
        >>> from picnn_fast.models.convert import published_picnn
        >>> published_picnn({"model": {"module.backbone.8.bias": torch.zeros(64)}})
        Traceback (most recent call last):
        ValueError: checkpoint: it lacks classifier.1.1, correlation, …; want one of PICNN's
    """
    model = checkpoint.get("model") if isinstance(checkpoint, Mapping) else None
    if not isinstance(model, Mapping) or not all(isinstance(v, Tensor) for v in model.values()):
        raise ValueError("checkpoint: it holds no tensors under 'model'; want one of PICNN's")
    state: dict[str, Tensor] = {}
    seen: set[str] = set()
    for name, value in model.items():
        bare = name.removeprefix("module.")  # of DataParallel
        pattern = next((pattern for pattern in _PICNN if re.match(pattern, bare)), None)
        if pattern is None:
            raise ValueError(f"checkpoint: it holds {name}, which no layer of PICNN's is called")
        seen.add(pattern)
        state[re.sub(f"^{pattern}", _PICNN[pattern], bare)] = value
    lacking = sorted(re.sub(r"\\|\.$|\$$", "", p).rstrip(".") for p in _PICNN.keys() - seen)
    if lacking:
        shown = ", ".join(sorted(lacking, key=lambda name: name.startswith("backbone"))[:2])
        raise ValueError(
            f"checkpoint: it lacks {shown}{', …' if len(lacking) > 2 else ''}; want one of PICNN's"
        )
    return state
