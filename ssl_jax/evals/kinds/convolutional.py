"""A small convolutional classifier on the maps of a layer, frozen: the layers above it are replaced by ones trained on labels.

RotNet's convolutional classifier (Gidaris et al. 2018, arXiv:1803.07728): a 3x3 and two 1x1 convolutions of 192 channels with BatchNorm
and ReLU, the mean over space, and a linear layer; a block of the encoder `nin`. Its figure for CIFAR-10 is of `layer='block2'`, with
random crops and mirrored images; here there is no augmentation.
"""

from __future__ import annotations

import jax

from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import Evaluator, Option
from ssl_jax.evals.lib import network_probe
from ssl_jax.models.heads import ConvolutionalHead

MILESTONES = (0.35, 0.7, 0.85)


def prepare(context: Context, *, layer: str, **_) -> None:
    """Raises UserError if the encoder has no maps `layer`."""
    outputs = jax.eval_shape(context.encode, context.images())
    if layer not in outputs or outputs[layer].ndim != 4:
        maps = ", ".join(sorted(name for name, x in outputs.items() if x.ndim == 4)) or "none"
        raise UserError(f"convolutional reads maps, and {layer!r} is none; maps of the encoder: {maps}")


def evaluate(
    context: Context,
    *,
    layer: str = "layer2",
    channels: int = 192,
    epochs: int = 100,
    batch_size: int = 128,
    learning_rate: float = 0.1,
    weight_decay: float = 5e-4,
    seed: int = 0,
) -> Result:
    """Nothing is chosen: the network after the last step is tested once.

    top1, top5: accuracy on the test split, in percent.
    """
    training = network_probe.Training(epochs, batch_size, learning_rate, weight_decay, seed, MILESTONES)
    what = f"convolutional probe, 3x3, 1x1, 1x1 of {channels} channels with BatchNorm and ReLU, mean, linear"
    return network_probe.evaluate(context, layer, lambda classes: ConvolutionalHead(classes, channels), what, training)


EVALUATOR = Evaluator(
    evaluate,
    {
        "layer": Option("layer of the encoder with maps"),
        "channels": Option("channels of the convolutions", least=1),
        **network_probe.OPTIONS,
    },
    needs=("model",),
    data=("label",),
    prepare=prepare,
)
