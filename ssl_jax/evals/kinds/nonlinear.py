"""A classifier of two hidden layers on all numbers of a layer, frozen: how much a linear classifier misses.

RotNet's non-linear classifier (Gidaris et al. 2018, arXiv:1803.07728): 20 units per class and at most 2,048, with BatchNorm and ReLU,
twice, and a linear layer. Its figures for CIFAR-10 are of whole maps (`layer='block2'` of the encoder `nin`), with random crops and
mirrored images; here there is no augmentation.
"""

from __future__ import annotations

from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import Evaluator, Option
from ssl_jax.evals.lib import network_probe
from ssl_jax.models.heads import ProjectionHead

MILESTONES = (0.4, 0.8, 0.9)


def evaluate(
    context: Context,
    *,
    layer: str = "pooled",
    epochs: int = 50,
    batch_size: int = 128,
    learning_rate: float = 0.1,
    weight_decay: float = 5e-4,
    seed: int = 0,
) -> Result:
    """Nothing is chosen: the network after the last step is tested once.

    top1, top5: accuracy on the test split, in percent.
    """

    def network(classes):
        hidden = min(20 * classes, 2048)
        return ProjectionHead((hidden, hidden, classes), last_batch_norm=False, last_bias=True)

    training = network_probe.Training(epochs, batch_size, learning_rate, weight_decay, seed, MILESTONES)
    return network_probe.evaluate(
        context, layer, network, "nonlinear probe, 2 x (linear, BatchNorm, ReLU), linear", training
    )


EVALUATOR = Evaluator(
    evaluate,
    {
        "layer": Option("layer of the encoder, all of whose numbers are read, also those of maps"),
        **network_probe.OPTIONS,
    },
    data=("label",),
)
