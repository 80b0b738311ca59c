"""Quantizers: exact nearest codes, straight-through gradients, codebook updates, entropy losses, FSQ and LFQ."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ssl_jax.errors import UserError
from ssl_jax.objectives import quantizers as q
from ssl_jax.objectives.codebooks import build_quantizer

HIGHEST = jax.lax.Precision.HIGHEST


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def distances(z, codes):
    """In float64."""
    z, codes = z.astype(np.float64), codes.astype(np.float64)
    return (z**2).sum(-1)[:, None] - 2 * z @ codes.T + (codes**2).sum(-1)


# --------------------------------------------------------------------------------------------------------- look-ups


@pytest.mark.parametrize("dim", [8, 32])
@pytest.mark.full
def test_nearest_of_8192_unit_codes_is_exact_and_bfloat16_is_not(dim):
    z, codes = unit(normal(0, 1024, dim)), unit(normal(1, 8192, dim))
    tokens = np.asarray(jax.jit(q.nearest)(z, codes))
    exact = distances(z, codes)
    least = exact.min(-1)
    assert np.all(exact[np.arange(1024), tokens] - least < 1e-6)  # the nearest code within float32 precision
    assert np.mean(tokens != exact.argmin(-1)) < 2e-3
    np.testing.assert_array_equal(exact.argmin(-1), (z.astype(np.float64) @ codes.T.astype(np.float64)).argmax(-1))  # the least angle
    np.testing.assert_allclose(least, 2 - 2 * (z.astype(np.float64) @ codes.T).max(-1), atol=1e-6)
    coarse = jnp.argmax(jnp.dot(z.astype(jnp.bfloat16), codes.T.astype(jnp.bfloat16)), -1)
    assert np.mean(np.asarray(coarse) != exact.argmin(-1)) > 0.01


def test_nearest_keeps_precision_far_from_zero():
    """With mean 100 and deviation 0.1, |e|^2 - 2 z.e of the raw vectors would choose wrong codes for most vectors."""
    z, codes = 100 + 0.1 * normal(0, 512, 8), 100 + 0.1 * normal(1, 1024, 8)
    exact = distances(z, codes).argmin(-1)
    np.testing.assert_array_equal(q.nearest(z, codes), exact)
    naive = np.argmin((codes**2).sum(-1) - 2 * z @ codes.T, -1)
    assert np.mean(naive != exact) > 0.3


def test_nearest_in_chunks_returns_the_first_of_equal_codes(monkeypatch):
    z, codes = np.round(2 * normal(0, 4, 16, 3)), np.round(2 * normal(1, 64, 3))  # many at equal distances, all exact
    whole = np.asarray(q.nearest(z, codes))
    gaps = distances(z.reshape(-1, 3), codes)
    assert ((gaps == gaps.min(-1, keepdims=True)).sum(-1) > 1).mean() > 0.2
    np.testing.assert_array_equal(whole.reshape(-1), gaps.argmin(-1))
    monkeypatch.setattr(q, "CHUNK", 10)
    np.testing.assert_array_equal(q.nearest(z, codes), whole)


@pytest.mark.parametrize("tensor", [2, 4])
def test_nearest_with_a_sharded_codebook_equals_the_unsharded_one(tensor):
    mesh = jax.make_mesh((8 // tensor, 1, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    ties = np.round(2 * normal(0, 16, 8, 3)), np.round(2 * normal(1, 64, 3))
    for z, codes in (ties, (unit(normal(2, 16, 32, 8)), unit(normal(3, 1024, 8)))):
        dense = np.asarray(q.nearest(z, codes))
        with jax.set_mesh(mesh):
            sharded = jax.device_put(z, NamedSharding(mesh, P(("data", "fsdp"))))
            nearest = jax.jit(q.nearest)
            np.testing.assert_array_equal(nearest(sharded, codes), dense)
            assert "all-gather" in nearest.lower(sharded, codes).compile().as_text()  # used the sharded path
            np.testing.assert_array_equal(jax.jit(q.nearest)(z[:3], codes), dense[:3])  # a batch that does not divide


# ------------------------------------------------------------------------------------------------------- gradients


def gradient(through, z, code, weight):
    return jax.grad(lambda z: jnp.sum(q.STRAIGHT_THROUGH[through](z, code) * weight))(z)


@pytest.mark.parametrize("size", [5, 16])
def test_gradient_of_codebook_rows_equals_a_scatter_add(size, monkeypatch):
    """Also with a smaller last chunk, and if all vectors share one code."""
    monkeypatch.setattr(q, "CHUNK", 6)
    rng = np.random.default_rng(0)
    codebook, z = rng.normal(size=(size, 3)).astype(np.float32), rng.normal(size=(4, 7, 3)).astype(np.float32)
    for tokens in (rng.integers(0, size, (4, 7)), np.full((4, 7), size - 1)):
        expected = np.zeros((size, 3))
        for token, row in zip(tokens.reshape(-1), z.reshape(-1, 3), strict=True):
            expected[token] += row
        np.testing.assert_allclose(q.sums(z, tokens, size), expected, atol=1e-5)
        value, pull = jax.vjp(lambda c: q.rows(c, tokens), codebook)  # noqa: B023
        np.testing.assert_array_equal(value, codebook[tokens])
        np.testing.assert_allclose(pull(z)[0], expected, atol=1e-5)


def test_straight_through_values_and_gradients():
    z, code, g = 3 * normal(0, 50, 8), unit(normal(1, 50, 8)), normal(2, 50, 8)
    for name, through in q.STRAIGHT_THROUGH.items():
        np.testing.assert_array_equal(through(z, code), code, err_msg=name)  # bit-identical to the codes of the tokens
        of_code = jax.grad(lambda code, through=through: jnp.sum(through(z, code) * g))(code)
        np.testing.assert_array_equal(of_code, np.zeros_like(code), err_msg=name)
    np.testing.assert_array_equal(gradient("plain", z, code, g), g)

    u, norm = unit(z), np.linalg.norm(z, axis=-1, keepdims=True)
    tangent = (g - u * np.sum(u * g, -1, keepdims=True)) / norm
    np.testing.assert_allclose(gradient("normalized", z, code, g), tangent, atol=1e-5)
    small = gradient("normalized", 1e-3 * u, code, g)
    np.testing.assert_allclose(np.linalg.norm(small), np.linalg.norm(tangent * norm) * 1e3, rtol=1e-3)


def test_rotation_trick_gradient_equals_the_rotation_matrix():
    """The angle to the gradient is kept, and norms are scaled by |code| / |z|."""
    z, code, g = 3 * normal(0, 50, 8), 2 * normal(1, 50, 8), normal(2, 50, 8)
    dz = gradient("rotation", z, code, g)
    cosine = lambda a, b: np.sum(unit(a) * unit(b), -1)  # noqa: E731
    np.testing.assert_allclose(cosine(z, np.asarray(dz)), cosine(code, g), atol=1e-6)
    ratio = np.linalg.norm(code, axis=-1) / np.linalg.norm(z, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(dz, axis=-1) / np.linalg.norm(g, axis=-1), ratio, rtol=1e-5)
    # The rotation itself, written as a matrix for one vector.
    u, v = unit(z[0]), unit(code[0])
    w = unit(u + v)
    matrix = ratio[0] * (np.eye(8) - 2 * np.outer(w, w) + 2 * np.outer(v, u))
    np.testing.assert_allclose(matrix @ z[0], code[0], atol=1e-5)
    np.testing.assert_allclose(dz[0], matrix.T @ g[0], atol=1e-5)


@pytest.mark.full
def test_normalized_has_a_finite_gradient_at_zero():
    zero = jnp.zeros(4)
    assert np.isfinite(jax.grad(lambda x: q.normalized(x).sum())(zero)).all()
    for other in (lambda x: x / jnp.linalg.norm(x), lambda x: x / jnp.maximum(jnp.linalg.norm(x), 1e-6)):
        assert np.isnan(jax.grad(lambda x, other=other: other(x).sum())(zero)).all()
    for name in q.STRAIGHT_THROUGH:
        assert np.isfinite(gradient(name, jnp.zeros((1, 4)), jnp.ones((1, 4)), jnp.ones((1, 4)))).all()
    z = normal(0, 20, 5)
    np.testing.assert_allclose(q.normalized(z), unit(z), atol=1e-6)


@pytest.mark.full
def test_losses_of_a_learned_codebook():
    """beta weights the commitment, unused codes get no gradient, and the gradient of unit codes is orthogonal to z."""
    quantizer = build_quantizer(dict(name="learned", size=64, dim=8, normalize=True))
    (params, state), z = quantizer.init(jax.random.key(0)), normal(0, 4, 5, 8)

    def loss(params, z):
        out = quantizer.train(params, state, z, jax.random.key(1), 0)
        return out.loss, out

    (of_params, of_z), out = jax.grad(loss, (0, 1), has_aux=True)(params, z)
    code = unit(np.asarray(params["codebook"]))[out.tokens]
    np.testing.assert_allclose(out.loss, 1.25 * np.mean((unit(z) - code) ** 2), rtol=1e-5)
    norms = np.linalg.norm(of_params["codebook"], axis=-1)
    used = np.isin(np.arange(64), out.tokens)
    assert 1 < used.sum() < 64
    assert np.all(norms[used] > 0)
    np.testing.assert_array_equal(norms[~used], 0)
    assert np.abs(of_z).max() > 1e-3
    np.testing.assert_allclose(np.sum(of_z * z, -1), 0, atol=1e-8)
    direction = jax.grad(lambda z: q.commitment_loss(q.normalized(z), code))(z)
    np.testing.assert_allclose(of_z, 0.25 * direction, atol=1e-8)  # beta times the commitment gradient
    # The gradient of the decoder reaches z unchanged, and the codes not at all.
    weight = normal(3, 4, 5, 8)
    down = jax.grad(lambda p, z: jnp.sum(quantizer.train(p, state, z, jax.random.key(1), 0).codes * weight), (0, 1))(params, z)
    np.testing.assert_array_equal(down[0]["codebook"], 0)
    np.testing.assert_array_equal(down[1], weight)
    # Tokens to codes and back.
    tokens = quantizer.tokens(params, state, z)
    np.testing.assert_array_equal(tokens, out.tokens)
    np.testing.assert_array_equal(quantizer.embed(params, state, tokens), out.codes)
    np.testing.assert_array_equal(quantizer.codebook(params, state)[tokens], out.codes)


# -------------------------------------------------------------------------------------------------- moving averages


def test_moving_average_codebook_converges_to_means():
    z, tokens = normal(0, 60, 4), np.arange(60) % 5  # codes 5, 6 and 7 get none
    means = np.stack([z[tokens == k].mean(0) for k in range(5)])
    start = normal(1, 8, 4)
    state = dict(codebook=start, count=jnp.ones(8), sum=start, weight=jnp.ones(()))
    update = jax.jit(lambda state: q.moving_average(state, z, tokens, 0.8))
    for _ in range(100):
        state = update(state)
    np.testing.assert_allclose(state["codebook"][:5], means, atol=1e-5)
    np.testing.assert_allclose(state["count"], [12] * 5 + [0] * 3, atol=1e-5)
    one = q.moving_average(dict(codebook=start, count=jnp.ones(8), sum=start, weight=jnp.ones(())), z, tokens, 0.8)
    np.testing.assert_allclose(one["codebook"][5:], start[5:], rtol=1e-3)  # unchanged up to the smoothing of 1e-5
    np.testing.assert_allclose(one["count"], 0.8 + 0.2 * np.array([12] * 5 + [0] * 3), rtol=1e-6)
    assert q.counts(tokens, 8).sum() == 60


def test_debiased_moving_average_equals_the_first_batch():
    z, tokens = normal(0, 60, 4), np.arange(60) % 5
    state = dict(codebook=normal(1, 5, 4), count=jnp.zeros(5), sum=jnp.zeros((5, 4)), weight=jnp.zeros(()))
    state = q.moving_average(state, z, tokens, 0.99)
    np.testing.assert_allclose(state["codebook"], [z[tokens == k].mean(0) for k in range(5)], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state["weight"], 0.01, rtol=1e-5)
    np.testing.assert_allclose(state["count"] / state["weight"], np.full(5, 12), rtol=1e-5)


def test_moving_average_uses_the_global_batch():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    z, tokens, start = normal(0, 64, 4), np.arange(64) % 5, normal(1, 5, 4)
    state = dict(codebook=start, count=jnp.ones(5), sum=start, weight=jnp.ones(()))
    one = q.moving_average(state, z, tokens, 0.9)
    sharded = jax.jit(lambda z, t: q.moving_average(state, z, t, 0.9))(
        *(jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (z, tokens))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), sharded, one)


@pytest.mark.full
@pytest.mark.parametrize("update", ["average", "gradient"])
@pytest.mark.parametrize("normalize", [False, True])
def test_dead_codes_restart_at_vectors_of_the_batch(update, normalize):
    spec = dict(name="learned", size=16, dim=4, codebook_update=update, normalize=normalize, revive=0.5, decay=0.9)
    quantizer = build_quantizer(spec)
    (params, state), z = quantizer.init(jax.random.key(0)), 5 + 0.1 * normal(0, 64, 4)  # far from most codes
    before = quantizer.codebook(params, state)
    train = jax.jit(quantizer.train)
    for step in range(60):
        out = train(params, state, z, jax.random.key(step), step)
        state = out.state
        if step == 0:
            assert out.logs["revived"] == 0  # initial counts are 1
            assert out.logs["usage_of_batch"] < 0.5
    after = quantizer.codebook(params, state)
    assert out.logs["usage_of_batch"] > 0.5
    to_vectors = np.sqrt(distances(np.asarray(after), unit(z) if normalize else z).clip(0)).min(-1)
    assert np.all(to_vectors < 0.2), to_vectors  # every code is near a vector
    assert not np.allclose(before, after)
    other = train(params, state, z, jax.random.key(5), 60)
    np.testing.assert_array_equal(other.tokens, train(params, state, z, jax.random.key(6), 60).tokens)
    if update == "gradient":  # the codes are still trained: d(code) / d(parameter) is one
        grad = jax.grad(lambda p: quantizer.train(p, state, z, jax.random.key(5), 60).loss)(params)["codebook"]
        assert np.abs(grad).max() > 0


@pytest.mark.full
def test_k_means_finds_clusters_and_initializes_a_codebook():
    centers = 10 * np.array(list(itertools.product((-1, 1), repeat=4)), np.float32)
    z = np.repeat(centers, 20, 0) + 0.1 * normal(0, 320, 4)
    means = z.reshape(16, 20, 4).mean(1)
    found = np.asarray(jax.jit(q.k_means, static_argnums=2)(jax.random.key(0), z, 16))
    order = distances(means, found).argmin(-1)
    assert sorted(order) == list(range(16))  # k-means++ finds one center in each
    np.testing.assert_allclose(found[order], means, atol=1e-5)
    for update in ("average", "gradient"):
        quantizer = build_quantizer(dict(name="learned", size=16, dim=4, init="k_means", codebook_update=update))
        params, state = quantizer.init(jax.random.key(1))
        out = jax.jit(quantizer.train)(params, state, z, jax.random.key(0), 0)
        assert out.logs["usage_of_batch"] == 1
        np.testing.assert_allclose(out.logs["distance_to_code"], 0.01, rtol=0.2)
        later = jax.jit(quantizer.train)(params, out.state, z + 50, jax.random.key(0), 1)
        kept = quantizer.codebook(params, later.state)
        assert np.abs(np.asarray(kept)).max() < 50  # initialized only once


# -------------------------------------------------------------------------------------------- entropies and measures


def test_usage_and_perplexity():
    for count, used, perplexity in (([3, 3, 3, 3], 1, 4), ([12, 0, 0, 0], 0.25, 1), ([6, 6, 0, 0], 0.5, 2)):
        np.testing.assert_allclose(q.usage(jnp.array(count)), used)
        np.testing.assert_allclose(q.perplexity(jnp.array(count, jnp.float32)), perplexity, rtol=1e-6)
    rng = np.random.default_rng(0)
    for n in (5, 100):
        count = np.bincount(rng.integers(0, 64, n), minlength=64).astype(np.float32)
        assert 1 <= q.perplexity(count) <= min(64, n) + 1e-4
        assert q.usage(count) * 64 >= q.perplexity(count) - 1e-4
    count = np.bincount(rng.integers(0, 8192, 1024), minlength=8192).astype(np.float32)
    assert 925 < q.perplexity(count) < 950  # 1024 uniform draws of 8192: 1024 exp(-1024 ln 2 / 8192) = 939 for their pairs


@pytest.mark.full
def test_entropy_loss_against_a_loop_and_its_range():
    z, codes, tau = normal(0, 30, 3), normal(1, 7, 3), 0.5
    p = np.exp(-distances(z, codes) / tau)
    p /= p.sum(-1, keepdims=True)
    entropies, mean = -(p * np.log(p)).sum(-1).mean(), p.mean(0)
    np.testing.assert_allclose(q.entropy_loss(z, codes, tau), entropies + (mean * np.log(mean)).sum(), atol=1e-5)
    assert -np.log(7) <= q.entropy_loss(z, codes, 1e-2) <= 0
    np.testing.assert_allclose(q.entropy_loss(codes, codes, 1e-2), -np.log(7), atol=1e-4)  # confident and uniform
    assert np.isfinite(jax.grad(lambda z: q.entropy_loss(z, codes, 1e-6))(z)).all()


@pytest.mark.full
def test_bit_entropy_loss_equals_entropy_loss_of_all_codes():
    z, tau = 0.3 * normal(0, 40, 6), 0.5
    codes = np.asarray(q.lfq_codes(jnp.arange(64), 6))
    whole = q.entropy_loss(z, codes, tau)
    np.testing.assert_allclose(q.bit_entropy_loss(z, tau), whole, atol=1e-5)
    assert q.bit_entropy_loss(z, tau, group=3) <= whole + 1e-6  # entropies of groups bound the joint entropy from above
    assert np.isfinite(jax.grad(lambda z: q.bit_entropy_loss(z, 1e-3))(100 * z)).all()  # saturated


# --------------------------------------------------------------------------------------------------- FSQ and LFQ


@pytest.mark.full
@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (8, 8, 8), (7, 4, 3)])
def test_fsq_is_a_bijection_on_its_levels(levels):
    size = int(np.prod(levels))
    codes = np.asarray(q.fsq_codes(jnp.arange(size), levels))
    assert len({tuple(c) for c in codes.tolist()}) == size
    np.testing.assert_array_equal(q.fsq_tokens(codes, levels), np.arange(size))
    for d, n in enumerate(levels):
        np.testing.assert_allclose(sorted(set((codes[:, d] * (n // 2)).tolist())), np.arange(-(n // 2), n - n // 2), atol=1e-6)
    np.testing.assert_array_equal(q.fsq(jnp.zeros((1, len(levels))), levels), np.zeros((1, len(levels))))
    z = normal(0, 50_000, len(levels))
    out = np.asarray(q.fsq(z, levels))
    tokens = np.asarray(q.fsq_tokens(out, levels))
    np.testing.assert_array_equal(q.fsq_codes(tokens, levels), out)
    assert len(np.unique(tokens)) > 0.95 * size  # tanh reaches all levels
    slope = jax.grad(lambda z: q.fsq(z, levels).sum())(jnp.zeros((1, len(levels))))
    half = np.array([(n - 1) * 0.999 / 2 for n in levels])
    offset = np.array([0.5 * (n % 2 == 0) for n in levels])
    # of the bounded value: rounding has gradient one
    expected = half * (1 - np.tanh(np.tan(offset / half)) ** 2) / np.array([n // 2 for n in levels])
    np.testing.assert_allclose(slope[0], expected, rtol=1e-4)


def test_fsq_is_the_published_formula_and_reaches_all_levels():
    """Mentzer et al. 2023, appendix A.1, in float64."""
    levels = np.array([3, 4, 5, 8, 255, 1000])
    half = (levels - 1) * (1 - 1e-3) / 2
    offset = np.where(levels % 2 == 1, 0.0, 0.5)
    z = np.linspace(-9, 9, 4001)[:, None].repeat(len(levels), 1)
    bounded = np.tanh(z + np.tan(offset / half)) * half - offset
    clear = np.abs(bounded % 1 - 0.5) > 1e-3  # rounding does not depend on float32
    codes = np.asarray(q.fsq(jnp.asarray(z, jnp.float32), tuple(levels))) * (levels // 2)
    np.testing.assert_allclose(np.where(clear, codes, 0), np.where(clear, np.round(bounded), 0), atol=1e-4)
    np.testing.assert_allclose([codes.min(0), codes.max(0)], [-(levels // 2), levels - 1 - levels // 2], atol=1e-4)


def test_lfq_of_24_bits_has_exact_tokens():
    codes = np.ones((1, 24), np.float32)
    tokens = q.lfq_tokens(codes)
    assert int(np.float32(tokens)[0]) == int(tokens[0]) == 2**24 - 1
    np.testing.assert_array_equal(q.lfq_codes(tokens, 24), codes)
    build_quantizer(dict(name="lfq", bits=24))


def test_lfq_is_a_bijection_with_the_gradient_of_its_input():
    codes = np.asarray(q.lfq_codes(jnp.arange(1024), 10))
    assert set(np.unique(codes)) == {-1, 1}
    np.testing.assert_array_equal(q.lfq_tokens(codes), np.arange(1024))
    z, g = normal(0, 20, 10), normal(1, 20, 10)
    np.testing.assert_array_equal(q.lfq(z), np.sign(z))
    np.testing.assert_array_equal(jax.grad(lambda z: jnp.sum(q.lfq(z) * g))(z), g)


@pytest.mark.parametrize("spec", [dict(name="fsq", levels=(8, 5, 5, 5)), dict(name="lfq", bits=6)])
@pytest.mark.full
def test_quantizers_without_a_codebook(spec):
    quantizer = build_quantizer(spec)
    params, state = quantizer.init(jax.random.key(0))
    z = normal(0, 3, 4, 4, quantizer.dim)
    out = quantizer.train(params, state, z, jax.random.key(1), 0)
    assert (out.tokens.shape, out.codes.shape) == (z.shape[:-1], z.shape)
    np.testing.assert_array_equal(quantizer.codebook(params, state)[quantizer.tokens(params, state, z)], out.codes)
    if spec["name"] == "lfq":
        loss = 0.25 * np.mean((z - np.sign(z)) ** 2) + 0.1 * q.bit_entropy_loss(z, 0.01)
        np.testing.assert_allclose(out.loss, loss, rtol=1e-5)


def test_invalid_quantizer_options_raise_user_errors():
    for spec, message in (
        (dict(name="rvq"), "quantizer.name='rvq' is unknown; choose learned, fsq, lfq"),
        (dict(name="fsq", size=3), "quantizer.size is no option of 'fsq'; options: levels"),
        (dict(name="learned", straight_through="d"), "straight_through='d' is unknown; choose plain, normalized, rotation"),
        (dict(name="learned", straight_through="normalized"), "is for unit codes; set normalize=True"),
        (dict(name="fsq", levels=(8, 1)), r"levels=\(8, 1\): give 3 to 1000 levels for each dimension; for codes of two levels, use"),
        (dict(name="fsq", levels=(2, 8)), "give 3 to 1000 levels"),
        (dict(name="fsq", levels=()), "give 3 to 1000 levels"),
        (dict(name="fsq", levels=(1001,)), "give 3 to 1000 levels"),
        (dict(name="fsq", levels=(8,) * 9), "134,217,728 codes are more than 16,777,216"),
        (dict(name="lfq", bits=25), "bits=25: 33,554,432 codes are more than 16,777,216, the most that evaluations can count"),
        (dict(name="lfq", bits=0), "bits=0 must be a whole number of at least 1"),
        (dict(name="learned", size=0), "size=0 must be a whole number of at least 1"),
        (dict(name="lfq", bits=8.5), "bits=8.5 must be a whole number"),
        (dict(name="fsq", levels=8), "levels=8: give 3 to 1000 levels"),
    ):
        with pytest.raises(UserError, match=message):
            build_quantizer(spec)
