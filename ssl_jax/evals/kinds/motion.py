"""The motion between two views of held-out images as the model predicts it, beside the true one."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import SEED, Evaluator, Option

SHOWN = 500  # points of each panel of the picture


def evaluate(context: Context, *, examples: int = 2048, seed: int = 0) -> Result:
    """The first `examples` test images. Names begin with the axis of the motion, as in dx_error; units are those of the motion.

    error: mean absolute error.
    error_constant: that of the best constant, the median of the true motions.
    correlation: between predicted and true motions, in [-1, 1]; 0 for constant predictions.
    """
    axes = []

    def rows(batch, key):
        found = context.model.fns.motion(batch, key)
        axes[:] = found
        return {"rows": jnp.stack([axis[name] for axis in found.values() for name in ("predicted", "true")], 1)}

    found = context.encode_batches(rows, "rows", examples, seed).x.astype(np.float64)
    metrics, pairs = {}, dict(zip(axes, found.T.reshape(len(axes), 2, -1), strict=True))
    for axis, (predicted, true) in pairs.items():
        metrics[f"{axis}_error"] = np.abs(predicted - true).mean()
        metrics[f"{axis}_error_constant"] = np.abs(true - np.median(true)).mean()
        metrics[f"{axis}_correlation"] = correlation(predicted, true)
    protocol = f"motion {', '.join(axes)} between views of training, first of {context.name('test', len(found))} seed={seed}"
    return Result({name: float(value) for name, value in metrics.items()}, protocol, plot(pairs))


EVALUATOR = Evaluator(
    evaluate, {"examples": Option("number of test images, the first ones", least=2), "seed": SEED}, needs=("motion",)
)


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's, of float64 [N] and [N]; 0 if one of them is constant up to rounding."""
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 1e-9 * len(x) else 0.0


def plot(pairs) -> np.ndarray:
    """uint8 [H, W, 3]: a panel for each axis of {axis: (predicted [N], true [N])}, with the diagonal of right answers."""
    figure = Figure(figsize=(3 * len(pairs), 3.2), dpi=100, layout="constrained")
    for panel, (axis, (predicted, true)) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs.items(), strict=True):
        most = 1.1 * max(np.abs(true).max(), 1e-6)
        panel.plot([-most, most], [-most, most], color="gray", linewidth=1)
        panel.scatter(true[:SHOWN], predicted[:SHOWN], s=6, alpha=0.5, linewidths=0)
        panel.set(title=axis, xlabel="true", ylabel="predicted", xlim=(-most, most), ylim=(-most, most), aspect="equal")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
