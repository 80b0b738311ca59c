"""Optional PyTorch libraries for parity tests: each function returns the module, or skips the test with the reason."""

import functools

import pytest


def require_torch():
    """The module torch."""
    return pytest.importorskip("torch", reason="parity test: pip install -r requirements-reference.txt")


@functools.cache
def _declare_torchvision_operators():
    # The compiled operators of torchvision do not load beside a CPU-only torch; models and transforms need only their schemas.
    torch = require_torch()
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library  # keep a reference: its registration ends with it


def _with_torchvision(name):
    require_torch()
    try:
        _declare_torchvision_operators()
    except RuntimeError:
        pass  # a complete torchvision has declared them itself
    return pytest.importorskip(name, reason="parity test: pip install -r requirements-reference.txt", exc_type=ImportError)


def require_torchvision():
    return _with_torchvision("torchvision")


def require_timm():
    return _with_torchvision("timm")


def require_lightly():
    return _with_torchvision("lightly.loss")


def require_torch_fidelity(module):
    return _with_torchvision(f"torch_fidelity.{module}")
