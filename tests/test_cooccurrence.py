"""Co-occurrence: the best logit is the pointwise mutual information; pairs, symmetry, affinity matrices, spectral clustering."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eval_contexts import make_context

from ssl_jax.engine.method import State
from ssl_jax.engine.pretext import other_image
from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.evals.kinds import affinity as kind
from ssl_jax.evals.lib import spectral
from ssl_jax.methods import build_method
from ssl_jax.methods.cooccurrence import symmetric
from ssl_jax.objectives.pairs import balanced_pairs

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 48, 48, 3), np.uint8)


def load(variant="smoke", size=48, **changes):
    """(config, method) with a network that compiles at once: one layer on the patches."""
    config = importlib.import_module("configs.cooccurrence").get_config(variant)
    with config.unlocked():
        config.data.image_shape, config.dtype = (size, size, 3), "float32"
        config.model.encoder, config.model.tile_operations = dict(name="mlp", widths=(5,), batch_norm=False), ()
        config.model.embed = config.model.head = dict(widths=())
        config.update_from_flattened_dict(changes)
    return config, build_method(config)


def start(method, images=IMAGES):
    """A state whose classifier, which starts at zero, has random weights."""
    params, mutable = jax.jit(method.init)(jax.random.key(0), {"image": jnp.asarray(images)}, {})
    return State(jnp.int32(0), params, {}, mutable, {})


def with_random_classifier(state):
    classifier = state.params["net"]["classifier"]
    kernel = jnp.asarray(np.random.default_rng(1).standard_normal(classifier["kernel"].shape), jnp.float32)
    return state._replace(params={"net": {**state.params["net"], "classifier": {**classifier, "kernel": kernel}}})


# --- the objective


def test_balanced_pairs_equals_a_float64_loop():
    rng = np.random.default_rng(0)
    together, apart = 3 * rng.standard_normal((4, 5)), 3 * rng.standard_normal((7, 3))
    losses = [np.mean([np.log1p(np.exp(sign * x)) for x in logits.ravel()]) for sign, logits in ((-1, together), (1, apart))]
    value, logs = balanced_pairs(jnp.asarray(together), jnp.asarray(apart))
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-6)
    np.testing.assert_allclose(logs["accuracy"], ((together > 0).mean() + (apart <= 0).mean()) / 2, rtol=1e-6)
    np.testing.assert_allclose(balanced_pairs(jnp.zeros(3), jnp.zeros(5))[0], np.log(2), rtol=1e-6)


@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.full
def test_optimal_logit_is_the_pointwise_mutual_information(times):
    """All pairs of a toy joint distribution of four symbols: the loss of a table of logits is convex, with its minimum at the PMI.

    It stays there with `times` as many pairs of the product, since both halves count alike.
    """
    counts = np.array([[9, 1, 1, 1], [1, 7, 2, 2], [1, 2, 4, 1], [1, 2, 1, 4]])
    marginal, total = counts.sum(1), counts.sum()
    a, b = (x.ravel() for x in np.indices(counts.shape))
    together = np.repeat(np.arange(16), counts.ravel())
    apart = np.repeat(np.arange(16), times * marginal[a] * marginal[b])
    pmi = np.log(counts.ravel() * total / (marginal[a] * marginal[b]))

    def loss(table):
        return balanced_pairs(table[together], table[apart])[0]

    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(pmi, jnp.float32)), 0, atol=2e-7)
    table, step = jnp.zeros(16), jax.jit(lambda table: table - 20 * jax.grad(loss)(table))
    for _ in range(2000):
        table = step(table)
    np.testing.assert_allclose(table, pmi, atol=1e-3)


# --- the method


@pytest.mark.parametrize("variant", ["smoke", "cifar10_small"])
@pytest.mark.full
def test_loss_starts_at_the_logarithm_of_two(variant):
    _, method = load(variant)
    state = start(method)
    value, (_, logs) = jax.jit(method.phases[0].loss)(state.params, state, {"image": IMAGES}, jax.random.key(1))
    np.testing.assert_allclose(value, np.log(2), rtol=1e-5)
    assert logs["chance"] == 0.5


@pytest.mark.full
def test_loss_equals_a_float64_loop_over_neighbors_in_the_image_and_in_another():
    """Joined by hand from features of single patches: 42 pairs of neighbors on a grid of 4, and as many with another image."""
    _, method = load(**{"model.jitter": 0, "views": ((),)})
    state = with_random_classifier(start(method))
    patches = method.views(jnp.asarray(IMAGES), jax.random.key(0))
    f = np.stack([method.encode(state.params, state.mutable, patches[:, i])["pooled"] for i in range(16)], 1).astype(np.float64)
    kernel = np.asarray(state.params["net"]["classifier"]["kernel"], np.float64)[:, 0]
    near = [(i, j) for i in range(16) for j in range(i) if max(abs(i // 4 - j // 4), abs(i % 4 - j % 4)) == 1]
    assert len(near) == 42

    def logit(x, y):
        return np.concatenate([x + y, np.abs(x - y), x * y]) @ kernel

    together = np.array([[logit(f[n, i], f[n, j]) for i, j in near] for n in range(6)])
    apart = np.array([[logit(f[n, j], f[1 if n == 0 else n - 1, i]) for i, j in near] for n in range(6)])
    value, _ = method.phases[0].loss(state.params, state, {"image": IMAGES}, jax.random.key(0))
    np.testing.assert_allclose(value, (np.log1p(np.exp(-together)).mean() + np.log1p(np.exp(apart)).mean()) / 2, rtol=1e-4)
    out = method.fns.pretext(state.params, state.mutable, {"image": IMAGES}, jax.random.key(0))[""]
    np.testing.assert_array_equal(out["answers"], np.repeat([[1, 0]], 42, axis=1).repeat(6, axis=0))
    np.testing.assert_allclose(np.sort(out["logits"][:, :42, 1]), np.sort(together), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(out["logits"][..., 0], 0)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_negatives_come_from_another_image_that_is_no_padding(size):
    numbers = np.asarray(other_image(jnp.arange(size)))
    assert (numbers != np.arange(size)).all()
    for valid in range(2, size + 1):
        assert (numbers[:valid] < valid).all()


def test_a_batch_of_one_image_is_refused():
    with pytest.raises(UserError, match="a batch has one; give batches of 2 or more"):
        other_image(jnp.zeros((1, 3)))


def test_joined_features_do_not_depend_on_the_order_of_the_patches():
    a, b = np.random.default_rng(0).standard_normal((2, 5, 7)).astype(np.float32)
    np.testing.assert_array_equal(symmetric(a, b), symmetric(b, a))
    assert symmetric(a, b).shape == (5, 21)


def test_affinity_matrix_has_the_logits_of_all_pairs_of_patches_at_their_corners():
    _, method = load(**{"model.stride": 7})
    state = with_random_classifier(start(method))
    found = jax.jit(method.fns.affinity)(state.params, state.mutable, jnp.asarray(IMAGES))
    assert found["pmi"].shape == (6, 36, 36) and int(found["size"]) == 8
    np.testing.assert_allclose(found["pmi"], found["pmi"].swapaxes(1, 2), rtol=1e-4, atol=1e-4)
    kernel = np.asarray(state.params["net"]["classifier"]["kernel"])[:, 0]
    corners = np.asarray(found["corners"])
    np.testing.assert_array_equal(corners[[0, 1, 6, 35]], [[2, 2], [2, 9], [9, 2], [37, 37]])  # 5 pixels are left over
    for i, j in ((0, 0), (3, 20), (35, 1)):
        x, y = (
            np.asarray(method.encode(state.params, state.mutable, jnp.asarray(IMAGES[:, r : r + 8, c : c + 8]))["pooled"])
            for r, c in corners[[i, j]]
        )
        expected = np.concatenate([x + y, np.abs(x - y), x * y], 1) @ kernel
        np.testing.assert_allclose(found["pmi"][:, i, j], expected, rtol=1e-3, atol=1e-3)


# --- spectral clustering and its scores


def two_blocks(between=0.1, seed=0):
    """(affinity of 20 nodes in two groups, mixed, group of each node)"""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.arange(20) % 2)
    noise = rng.uniform(0.8, 1.2, (20, 20))
    return np.where(group[:, None] == group, 1.0, between) * (noise + noise.T) / 2, group


@pytest.mark.parametrize("between", [0.01, 0.5])
def test_fiedler_vector_separates_the_two_blocks_of_an_affinity(between):
    weights, group = two_blocks(between)
    values, vectors = spectral.eigenvectors(weights, 3)
    assert abs(values[0]) < 1e-12 and values[1] < values[2]
    degree = np.sqrt(weights.sum(1))
    np.testing.assert_allclose(np.abs(vectors[:, 0]), degree / np.linalg.norm(degree), atol=1e-9)
    side = spectral.fiedler_vector(weights) > 0
    assert (side == group).all() or (side != group).all()


def test_spectral_segments_are_the_blocks_and_repeat():
    weights, group = two_blocks()
    cut = spectral.segments(weights, 2)
    assert kind.ari(cut, group) == 1
    np.testing.assert_array_equal(cut, spectral.segments(weights, 2))
    lone = np.zeros((20, 20)) + np.eye(20)
    assert np.isfinite(spectral.eigenvectors(lone * 0, 3)[1]).all() and spectral.segments(lone, 3).shape == (20,)


def test_scores_of_segments():
    truth = np.array([[0, 0, 1, 1], [0, 0, 1, 1]])
    assert kind.ari(1 - truth, truth) == kind.covering(5 - truth, truth) == 1
    assert kind.covering(np.zeros((2, 4), int), truth) == 0.5
    cut = np.array([[0, 1, 1, 1], [0, 1, 1, 1]])
    np.testing.assert_allclose(kind.covering(cut, truth), (4 * 2 / 4 + 4 * 4 / 6) / 8)
    rng = np.random.default_rng(0)
    scores = [kind.ari(rng.integers(0, 3, (24, 24)), np.repeat(np.arange(2), 12)[:, None].repeat(24, 1)) for _ in range(50)]
    assert abs(np.mean(scores)) < 0.01


def test_every_pixel_belongs_to_the_nearest_patch():
    own = kind.nearest(np.array([[3.5, 3.5], [3.5, 11.5], [11.5, 3.5], [11.5, 11.5]]), (16, 16))
    np.testing.assert_array_equal(own, np.array([[0, 1], [2, 3]]).repeat(8, 0).repeat(8, 1))


def halves(count=6):
    """(images of two colors, their masks): the left and the right side, with a border at a random column."""
    rng, images, masks = np.random.default_rng(0), [], []
    for _ in range(count):
        mask = np.broadcast_to(np.arange(48) >= 8 * rng.integers(2, 5), (48, 48)).astype(np.uint8)
        colors = rng.integers(0, 256, (2, 3))
        images.append(np.clip(colors[mask] + rng.integers(-5, 6, (48, 48, 3)), 0, 255).astype(np.uint8))
        masks.append(mask[..., None])
    return np.stack(images), np.stack(masks)


def test_evaluation_scores_affinities_on_masks_beside_color():
    """An oracle's affinity, which knows the mask, gets 100; one that is equal for all pairs does not; colors of two halves do."""
    images, masks = halves()
    corners = np.stack(np.meshgrid(*[8 * np.arange(6)] * 2, indexing="ij"), -1).reshape(-1, 2)
    sides = masks[:, corners[:, 0] + 4, corners[:, 1] + 4, 0]

    def run(pmi):
        def affinity(batch):
            found = np.stack([pmi[int(np.abs(images.astype(int) - x).sum((1, 2, 3)).argmin())] for x in np.asarray(batch, int)])
            return {"pmi": jnp.asarray(found, jnp.float32), "corners": jnp.asarray(corners), "size": jnp.int32(8)}

        context = make_context(images, columns={"test": {"mask": masks}}, affinity=affinity)
        return evals.run({"own": {"kind": "affinity"}}, context)["own"]

    oracle = run(np.where(sides[:, :, None] == sides[:, None], 4.0, -4.0))
    assert oracle.metrics["own/ari"] == pytest.approx(100) == oracle.metrics["own/covering"]
    assert oracle.metrics["own/ari_color"] > 95
    blind = run(np.zeros((6, 36, 36)))
    assert blind.metrics["own/ari"] < 80 and blind.metrics["own/ari_color"] == oracle.metrics["own/ari_color"]
    assert oracle.picture.shape == (2 + 5 * 50, 2 + 6 * 50, 3)
    assert "2 segments of 36 patches of 8 pixels seed=0" in oracle.protocol


@pytest.mark.full
def test_pretext_evaluation_equals_the_balanced_loss():
    _, method = load(**{"model.jitter": 0, "views": ((),)})
    state = with_random_classifier(start(method))
    pretext = functools.partial(jax.jit(method.fns.pretext), state.params, state.mutable)
    found = evals.run({"own": {"kind": "pretext"}}, make_context(IMAGES, pretext=pretext, size=6))["own"]
    value, (_, logs) = method.phases[0].loss(state.params, state, {"image": IMAGES}, jax.random.key(0))
    assert found.metrics["own/loss"] == pytest.approx(float(value), rel=1e-4)
    assert found.metrics["own/accuracy"] == pytest.approx(100 * float(logs["accuracy"]), rel=1e-5)
    assert found.metrics["own/chance"] == 50


@pytest.mark.full
def test_patches_of_an_image_in_cifar10_small_are_gray_and_standardized():
    config = importlib.import_module("configs.cooccurrence").get_config("cifar10_small")
    with config.unlocked():
        config.data.image_shape, config.dtype = (32, 32, 3), "float32"
    views = np.asarray(build_method(config).views(jnp.asarray(IMAGES[:, :32, :32]), jax.random.key(0)))
    assert views.shape == (6, 9, 8, 8, 3)
    np.testing.assert_array_equal(views[..., :1] + 0 * views, views)
    assert config.model.standardize


@pytest.mark.full
def test_encode_reads_patches_as_in_training():
    """The layers of an image are those of its patches: maps side by side, and their mean."""
    config, method = load()
    state = start(method)
    tile, stride = config.model.tile, config.model.stride
    whole = method.encode(state.params, state.mutable, jnp.asarray(IMAGES[:2]))
    corners = range(0, IMAGES.shape[1] - tile + 1, stride)
    patches = np.stack([IMAGES[:2, r : r + tile, c : c + tile] for r in corners for c in corners], 1)
    each = method.encode(state.params, state.mutable, jnp.asarray(patches.reshape(-1, tile, tile, 3)))
    np.testing.assert_allclose(whole["pooled"], each["pooled"].reshape(2, len(corners) ** 2, -1).mean(1), rtol=1e-5, atol=1e-6)
