"""torchvision with a CPU-only torch: its compiled operators do not load, but models and transforms only need their schemas."""

from __future__ import annotations

import torch

_declared = []  # must live as long as torchvision is used


def torchvision():
    """The torchvision module. Declares its operators first if they are missing."""
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        import torchvision
    return torchvision
