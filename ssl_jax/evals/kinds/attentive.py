"""An attentive probe: one learned query attends to the tokens or map positions of a frozen layer, and a linear layer reads the result.

Beside the linear probe for methods whose class token or mean underrates them, such as MAE, I-JEPA and CAPI (facebookresearch/capi:
12,500 steps of 128 images per GPU, ten learning rates, three weight decays). All settings are trained at once on 90 % of the training
images; the other 10 % decide, and the chosen probe is tested once. The optimizer, AdamW, and the candidates are ours. Features are
cached in host memory, one float32 per number of the layer and image, so there is no augmentation.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from ssl_jax.engine.sharding import put_global
from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Result, require_labels
from ssl_jax.evals.evaluator import SEED, Evaluator, Option
from ssl_jax.evals.lib.features import Features, chunks, flat_mesh, hits, padded, replicate_tree
from ssl_jax.models.common import create, run
from ssl_jax.models.heads import AttentiveHead

LAYERS = r"(block|layer|conv)\d+(_\d+)?"


def layer_of(context: Context, maps: str) -> tuple[str, tuple[int, ...]]:
    """(name, shape without the batch) of the layer `maps`; '': the patches of a ViT, else the last numbered layer with positions.

    Raises:
        UserError: there is no such layer, or it has no positions.
    """
    outputs = {name: x.shape[1:] for name, x in jax.eval_shape(context.encode, context.images()).items()}
    found = {name: shape for name, shape in outputs.items() if len(shape) in (2, 3)}
    numbered = (name for name in found if re.fullmatch(LAYERS, name))
    last = max(numbered, key=lambda name: [int(number) for number in re.findall(r"\d+", name)], default="")
    name = maps or ("patches" if "patches" in found else last)
    if name not in found:
        problem = f"{name!r} is none" if name else "no numbered layer has any; give maps=NAME"
        raise UserError(f"attentive reads maps or tokens, and {problem}; the model has {', '.join(sorted(found)) or 'none'}")
    return name, found[name]


def prepare(context: Context, *, maps: str, **_) -> None:
    """Raises UserError if the encoder has no such maps or tokens."""
    layer_of(context, maps)


def evaluate(
    context: Context,
    *,
    maps: str = "",
    learning_rates: Sequence[float] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    weight_decays: Sequence[float] = (0.0, 1e-2, 1e-1),
    epochs: int = 10,
    batch_size: int = 128,
    validation: float = 0.1,
    seed: int = 42,
) -> Result:
    """AdamW with a cosine to 0, from one initialization for all settings.

    top1, top5: accuracy of the chosen probe on the test split, in percent.
    validation_top1: its accuracy on the held-out training images.
    """
    layer, shape = layer_of(context, maps)

    @jax.jit
    def flat(images):
        x = context.encode(images)[layer].astype(jnp.float32)
        return {"flat": x.reshape(len(x), -1)}

    bank, query = (context.encode_with(flat, split, "flat") for split in ("bank", "test"))
    require_labels(bank, "attentive probe")
    order = np.random.default_rng(seed).permutation(len(bank.y))
    held_out = min(max(1, round(validation * len(order))), len(order) - 1)
    chosen, fitted = (Features(bank.x[rows], bank.y[rows]) for rows in (np.sort(order[:held_out]), np.sort(order[held_out:])))
    grid = tuple(itertools.product(learning_rates, weight_decays))
    tokens = (-1, shape[-1])
    head = AttentiveHead(int(bank.y.max()) + 1)
    params = train(head, fitted, tokens, grid, epochs, batch_size, seed, context.mesh)
    scores = predict(head, params, chosen.x, tokens, context.mesh)
    accuracy = [100 * hits(scores[:, i], chosen.y, 1).mean() for i in range(len(grid))]
    best = int(np.argmax(accuracy))
    scores = predict(head, jax.tree.map(lambda x: x[best : best + 1], params), query.x, tokens, context.mesh)[:, 0]
    metrics = {f"top{k}": float(100 * hits(scores, query.y, k).mean()) for k in (1, 5)}
    protocol = (
        f"attentive probe adamw cosine epochs={epochs} batch={batch_size} lr={grid[best][0]:g} wd={grid[best][1]:g} chosen of"
        f" {len(grid)} on {validation:.0%} of train, not refitted, frozen features without augmentation seed={seed} layer={layer}"
        f" train={context.name('bank', len(bank.y))} test={context.name('test', len(query.y))}"
    )
    return Result(metrics | {"validation_top1": float(accuracy[best])}, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {
        "maps": Option("layer of the encoder with maps or tokens; '' is the patches of a ViT, else the last numbered layer"),
        "learning_rates": Option("candidate learning rates", above=0),
        "weight_decays": Option("candidate decoupled weight decays of the query and the kernels", least=0),
        "epochs": Option("passes over the training images", least=1),
        "batch_size": Option("images per step", least=1),
        "validation": Option("share of the training images that is held out to choose the probe", above=0, below=1),
        "seed": SEED,
    },
    needs=("model",),
    data=("label",),
    prepare=prepare,
)


def train(head: AttentiveHead, bank: Features, tokens, grid, epochs: int, batch_size: int, seed: int, mesh=None):
    """Parameters of all settings of `grid`, (learning rate, weight decay), with a leading axis of settings; bank.x [N, T * D]."""
    mesh, n = flat_mesh(mesh), len(bank.y)
    batch = -(-min(batch_size, n) // mesh.size) * mesh.size
    steps = -(-n // batch)
    rows_first, generator = NamedSharding(mesh, PartitionSpec("shard")), np.random.default_rng([seed, 1])
    with jax.set_mesh(mesh):
        settings = replicate_tree(tuple(np.float32(grid).T), mesh)
        example = replicate_tree(bank.x[:1].reshape(1, *tokens), mesh)
        carry = _start(example, head, len(grid), seed)
        for _ in range(epochs):
            order = np.resize(generator.permutation(n), (steps, batch))  # the last batch is filled with the first rows
            for rows in order:
                x, y = (put_global(part[rows], rows_first) for part in (bank.x, bank.y))
                carry = _step(carry, x, y, settings, head, tokens, epochs * steps)
    return jax.device_get(carry[0])


def predict(head: AttentiveHead, params, x: np.ndarray, tokens, mesh=None) -> np.ndarray:
    """Logits [N, settings, C] of x [N, T * D]."""
    mesh, logits = flat_mesh(mesh), []
    size = -(-min(256, len(x)) // mesh.size) * mesh.size
    with jax.set_mesh(mesh):
        params = replicate_tree(params, mesh)
        for start, stop in chunks(len(x), size):
            part = put_global(padded(x[start:stop], size), NamedSharding(mesh, PartitionSpec("shard")))
            logits.append(jax.device_get(_logits(params, part, head, tokens, mesh))[: stop - start])
    return np.concatenate(logits)


def _forward(head, params, x, tokens):
    """[N, settings, C]"""
    with jax.default_matmul_precision("highest"):
        return jax.vmap(lambda one: run(head, one, {}, x.reshape(len(x), *tokens), train=False)[0], out_axes=1)(params)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _start(example, head, count, seed):
    one, _ = create(head, jax.random.key(seed), example)
    params = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), one)
    return params, optax.scale_by_adam().init(params), jnp.zeros((), jnp.int32)


@functools.partial(jax.jit, static_argnums=(4, 5, 6), donate_argnums=0)
def _step(carry, x, y, settings, head, tokens, total):
    params, moments, done = carry
    rates, decays = settings

    def loss(params):
        logits = _forward(head, params, x, tokens)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, y[:, None].repeat(logits.shape[1], 1))
        return each.mean(0).sum()  # settings are independent: the gradient of the sum is that of each

    updates, moments = optax.scale_by_adam().update(jax.grad(loss)(params), moments)
    rate = rates * 0.5 * (1 + jnp.cos(jnp.pi * done / total))

    def moved(path, p, u):
        across = (-1, *(1,) * (p.ndim - 1))
        decayed = 0.0 if path[-1].key == "bias" else decays.reshape(across) * p
        return p - rate.reshape(across) * (u + decayed)

    return jax.tree_util.tree_map_with_path(moved, params, updates), moments, done + 1


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _logits(params, x, head, tokens, mesh):
    return jax.lax.with_sharding_constraint(_forward(head, params, x, tokens), NamedSharding(mesh, PartitionSpec()))
