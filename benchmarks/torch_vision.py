"""torchvision beside a CPU-only torch: its compiled operators do not load there, and models and transforms need their schemas alone."""

from __future__ import annotations

import torch

_declared = []  # must live as long as torchvision is used


def torchvision():
    """The module; where its operators are missing they are declared first."""
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        import torchvision
    return torchvision
