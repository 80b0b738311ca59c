"""Small networks that are trained on frozen features: the probes of RotNet (Gidaris et al. 2018, arXiv:1803.07728).

Stochastic gradient descent with Nesterov momentum .9, weight decay on all parameters, and a learning rate that falls by the factor
.2 at fixed fractions of the training. Features are cached, so there is no augmentation, unlike in the paper.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssl_jax.engine.optim import schedule
from ssl_jax.engine.sharding import put_global
from ssl_jax.evals.context import Context, Result, require_labels
from ssl_jax.evals.evaluator import SEED, Option
from ssl_jax.evals.lib.features import Features, chunks, flat_mesh, hits, padded
from ssl_jax.evals.lib.linear_probe import replicate_tree
from ssl_jax.models.common import create, run

OPTIONS = {
    "epochs": Option("passes over the training images", least=1),
    "batch_size": Option("images per step", least=1),
    "learning_rate": Option("learning rate at the start", above=0),
    "weight_decay": Option("weight decay of all parameters", least=0),
    "seed": SEED,
}
FACTOR = 0.2


class Training(NamedTuple):
    """How a network is trained."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    seed: int
    milestones: Sequence[float]  # fractions of the training at which the learning rate falls


def evaluate(context: Context, layer: str, make: Any, what: str, training: Training) -> Result:
    """Train the network `make(classes)` on whole maps of a layer; top1 and top5 on the test split in percent.

    `what` begins the protocol: the kind and its network.
    """

    @jax.jit
    def flat(images):
        x = context.encode(images)[layer].astype(jnp.float32)
        return {"flat": x.reshape(len(x), -1)}

    shape = jax.eval_shape(context.encode, context.images())[layer].shape[1:]
    bank, query = (context.encode_with(flat, split, "flat") for split in ("bank", "test"))
    require_labels(bank, what)
    network = make(int(bank.y.max()) + 1)
    variables = train(network, bank, shape, training, context.mesh)
    scores = predict(network, variables, query.x, shape, context.mesh)
    protocol = (
        f"{what}: nesterov .9 rate={training.learning_rate:g} x {FACTOR:g} at {', '.join(f'{m:g}' for m in training.milestones)} of"
        f" epochs={training.epochs} batch={training.batch_size} wd={training.weight_decay:g}, last weights, unscaled frozen features"
        f" without augmentation seed={training.seed} layer={layer} train={context.name('bank', len(bank.y))}"
        f" test={context.name('test', len(query.y))}"
    )
    return Result({f"top{k}": float(100 * hits(scores, query.y, k).mean()) for k in (1, 5)}, protocol)


def train(
    network: Any, bank: Features, shape: tuple[int, ...], training: Training, mesh: Mesh | None = None
) -> tuple[Any, Any]:
    """(params, state) of `network`, whose input is x [N, D] as [N, *shape], after the training; the last output is the logits."""
    mesh, n = flat_mesh(mesh), len(bank.y)
    batch = -(-min(training.batch_size, n) // mesh.size) * mesh.size
    steps = -(-n // batch)
    rate = schedule(
        "step", training.learning_rate, steps * training.epochs, milestones=training.milestones, factor=FACTOR
    )
    optimizer = optax.chain(
        optax.add_decayed_weights(training.weight_decay), optax.sgd(rate, momentum=0.9, nesterov=True)
    )
    rows_first = NamedSharding(mesh, PartitionSpec("shard"))
    generator = np.random.default_rng([training.seed, 1])
    with jax.set_mesh(mesh):
        carry = _start(replicate_tree(bank.x[: min(n, 2)].reshape(-1, *shape), mesh), network, optimizer, training.seed)
        for _ in range(training.epochs):
            order = np.resize(generator.permutation(n), (steps, batch))  # the last batch is filled with the first rows
            for rows in order:
                x, y = (put_global(part[rows], rows_first) for part in (bank.x, bank.y))
                carry = _step(carry, x, y, network, optimizer, shape)
    return carry[:2]


def predict(
    network: Any, variables: tuple[Any, Any], x: np.ndarray, shape: tuple[int, ...], mesh: Mesh | None = None
) -> np.ndarray:
    """Logits [N, C] of x [N, D], with running statistics."""
    mesh, logits = flat_mesh(mesh), []
    size = -(-min(1024, len(x)) // mesh.size) * mesh.size
    with jax.set_mesh(mesh):
        for start, stop in chunks(len(x), size):
            part = put_global(padded(x[start:stop], size), NamedSharding(mesh, PartitionSpec("shard")))
            logits.append(jax.device_get(_logits(variables, part, network, shape, mesh))[: stop - start])
    return np.concatenate(logits)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _start(x, network, optimizer, seed):
    params, state = create(network, jax.random.key(seed), x)
    return params, state, optimizer.init(params)


@functools.partial(jax.jit, static_argnums=(3, 4, 5), donate_argnums=0)
def _step(carry, x, y, network, optimizer, shape):
    params, state, memory = carry

    def loss(params):
        out, new = run(network, params, state, x.reshape(-1, *shape), train=True)
        return optax.softmax_cross_entropy_with_integer_labels(_last(out), y).mean(), new

    with jax.default_matmul_precision("highest"):
        grads, state = jax.grad(loss, has_aux=True)(params)
    updates, memory = optimizer.update(grads, memory, params)
    return optax.apply_updates(params, updates), state, memory


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _logits(variables, x, network, shape, mesh):
    with jax.default_matmul_precision("highest"):
        out, _ = run(network, *variables, x.reshape(-1, *shape), train=False)
    return jax.lax.with_sharding_constraint(_last(out), NamedSharding(mesh, PartitionSpec()))


def _last(out):
    return out[-1] if isinstance(out, tuple) else out
