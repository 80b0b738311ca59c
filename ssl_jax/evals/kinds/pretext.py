"""How well the model solves its own pretext task on held-out images, beside chance.

The questions are those of training (augmented views, with `config.views`), in inference mode. A high accuracy does not make good
features: shortcuts can solve a task, and white noise must not be solved at all.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.engine.pictures import grid
from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import SEED, Evaluator, Option
from ssl_jax.evals.lib.features import side_by_side

COLUMNS, FRAME, RIGHT, WRONG = 10, 2, (38, 140, 70), (200, 50, 45)  # of the picture: pairs, pixels of a frame, its colors


def evaluate(context: Context, *, examples: int = 2048, seed: int = 0) -> Result:
    """All questions about the first `examples` test images. Where a task has several kinds of questions, names begin with the kind.

    accuracy: percent of the questions whose most likely answer is right.
    chance: percent that guessing gets, 100 / number of answers.
    loss: cross-entropy of the answers in nats.
    loss_chance: that of guessing, the logarithm of the number of answers.
    """
    shapes = {}

    def rows(batch, key):
        outputs = context.model.fns.pretext(batch, key)
        shapes.update({kind: asked["logits"].shape[1:] for kind, asked in outputs.items()})
        return {"rows": jnp.concatenate([_right_and_loss(**asked) for asked in outputs.values()], 1)}

    found = context.encode_batches(rows, "rows", examples, seed).x.astype(np.float64)
    metrics, start = {}, 0
    for kind, (questions, answers) in shapes.items():
        right, loss = np.split(found[:, start : start + 2 * questions], 2, axis=1)
        start += 2 * questions
        own = {"accuracy": 100 * right.mean(), "chance": 100 / answers, "loss": loss.mean(), "loss_chance": np.log(answers)}
        metrics |= {f"{kind}_{name}" if kind else name: float(value) for name, value in own.items()}
    what = ", ".join(
        f"{questions} questions with {answers} answers" + (f" about {kind}" if kind else "")
        for kind, (questions, answers) in shapes.items()
    )
    protocol = f"pretext {what} an image about views of training, first of {context.name('test', len(found))} seed={seed}"
    return Result(metrics, protocol, picture=_picture(context, seed) if context.model.fns.draw_pretext else None)


EVALUATOR = Evaluator(
    evaluate, {"examples": Option("number of test images, the first ones", least=1), "seed": SEED}, needs=("pretext",)
)


@jax.jit
def _right_and_loss(logits, answers):
    """[B, 2 Q]: whether the most likely answer is right, then the cross-entropy."""
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), answers[..., None], -1)[..., 0]
    right = jnp.argmax(logits, -1) == answers
    return jnp.concatenate([right.astype(jnp.float32), -log_p], 1)


def _picture(context: Context, seed: int) -> np.ndarray:
    """uint8 [H, W, 3]: up to two rows of questions about different images, each above the answer in a green or red frame."""
    shape = []

    def rows(batch, key):
        drawn = context.model.fns.draw_pretext(batch, key)
        shape[:] = drawn["pictures"].shape[1:]
        return {"rows": side_by_side(drawn["pictures"], drawn["right"])}

    found = context.encode_batches(rows, "rows", 2 * COLUMNS, seed).x
    columns = min(COLUMNS, len(found))
    found = found[: len(found) // columns * columns]
    pictures = np.round(np.clip(found[:, :-1], 0, 1) * 255).astype(np.uint8).reshape(-1, *shape)
    framed = np.pad(pictures, ((0, 0), (0, 0), (FRAME, FRAME), (FRAME, FRAME), (0, 0)), constant_values=255)
    border = np.pad(np.zeros(shape[1:3], bool), FRAME, constant_values=True)
    for picture, right in zip(framed, found[:, -1] > 0, strict=True):
        picture[1, border] = RIGHT if right else WRONG
    pairs = framed.reshape(-1, columns, *framed.shape[1:]).swapaxes(1, 2)  # [rows, 2, columns, h, w, 3]
    return grid(pairs.reshape(-1, columns, *framed.shape[2:]))
