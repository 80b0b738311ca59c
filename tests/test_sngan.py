"""SNGAN's residual networks: sizes, shapes, state; latents and standing statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.errors import UserError
from ssl_jax.models.common import create, run
from ssl_jax.models.gan.sngan import SNGANDiscriminator, SNGANGenerator, downsample, upsample
from ssl_jax.models.gan.standing_stats import standing_stats
from ssl_jax.sampling.latents import sample_latents, truncate


def count(module, *args):
    params, _ = jax.eval_shape(lambda key: create(module, key, *args), jax.random.key(0))
    return sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("flavor", "generator", "discriminator"), [("miyato", 4_276_739, 1_053_824), ("compare_gan", 5_849_603, 1_483_137)]
)
def test_parameter_counts(flavor, generator, discriminator):
    assert count(SNGANGenerator(flavor=flavor), jnp.zeros((2, 128))) == generator
    assert count(SNGANDiscriminator(flavor=flavor), jnp.zeros((2, 32, 32, 3))) == discriminator
    assert count(SNGANDiscriminator(flavor=flavor, norm="none"), jnp.zeros((2, 32, 32, 3))) == discriminator


def test_upsample_and_downsample():
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 4))
    np.testing.assert_array_equal(upsample(x), np.asarray(x).repeat(2, 1).repeat(2, 2))
    np.testing.assert_allclose(downsample(upsample(x)), x, rtol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("flavor", ["miyato", "compare_gan"])
def test_shapes_range_and_state(flavor):
    z = jax.random.normal(jax.random.key(0), (4, 16))
    generator = SNGANGenerator(size=48, channels=8, flavor=flavor)
    params, state = create(generator, jax.random.key(1), z)
    assert set(state) == {"batch_stats"}
    images, _ = run(generator, params, state, z, train=True)
    assert images.shape == (4, 48, 48, 3)
    assert images.dtype == jnp.float32
    assert jnp.std(images) > 0.05
    assert jnp.abs(images).max() <= 1
    discriminator = SNGANDiscriminator(channels=8, flavor=flavor)
    params, state = create(discriminator, jax.random.key(2), images)
    assert set(state) == {"spectral"}
    (logits, features), new_state = run(discriminator, params, state, images, train=True)
    assert logits.shape == (4,)
    assert [features[f"layer{n}"].shape[1] for n in (1, 2, 3, 4)] == [24, 12, 12, 12]
    head = params["head"]["kernel"]
    want = features["pooled"] @ head[:, 0] / jnp.linalg.norm(head)
    np.testing.assert_allclose(logits, want, rtol=1e-4)
    last = jax.nn.relu(features["layer4"])
    np.testing.assert_allclose(features["pooled"], last.sum((1, 2)) if flavor == "miyato" else last.mean((1, 2)), rtol=1e-5)
    assert not jax.tree.all(jax.tree.map(np.array_equal, new_state, state))


def test_invalid_fields_raise_user_error():
    for make, message in (
        (lambda: SNGANGenerator(size=30), "multiple"),
        (lambda: SNGANGenerator(flavor="x"), "flavor 'x'"),
        (lambda: SNGANDiscriminator(norm="x"), "norm 'x'"),
        (lambda: sample_latents("x", jax.random.key(0), (2,)), "kind='x'"),
    ):
        with pytest.raises(UserError, match=message):
            make()


@pytest.mark.full
def test_truncated_latents_follow_the_truncated_normal():
    z = sample_latents("normal", jax.random.key(0), (100_000,))
    for tau, std in ((2.0, 0.8796), (1.0, 0.5396), (0.5, 0.2839), (0.4, 0.2285)):  # of the truncated normal, by integration
        got = truncate(z, tau)
        assert float(got.std()) == pytest.approx(std, abs=0.004)
        assert jnp.abs(got).max() <= tau
        order = jnp.argsort(z)
        assert (jnp.diff(got[order]) >= 0).all()
    resampled = np.random.default_rng(0).standard_normal(400_000)
    resampled = np.sort(resampled[np.abs(resampled) <= 0.8])
    quantiles = np.linspace(0.01, 0.99, 50)
    np.testing.assert_allclose(np.quantile(truncate(z, 0.8), quantiles), np.quantile(resampled, quantiles), atol=0.01)
    np.testing.assert_array_equal(truncate(z, 0.0), z)
    np.testing.assert_allclose(truncate(z, jnp.float32(1e9)), z, atol=2e-5)
    uniform = sample_latents("uniform", jax.random.key(0), (100_000,))
    assert float(uniform.min()) < -0.99
    assert float(uniform.std()) == pytest.approx(1 / np.sqrt(3), abs=0.004)


@pytest.mark.full
def test_standing_statistics_are_the_mean_over_batches():
    """The first normalization sees an affine map of z, so its statistics can be computed by hand."""
    generator = SNGANGenerator(size=8, channels=4, stages=1)
    key, passes = jax.random.key(3), 5
    params, state = create(generator, jax.random.key(0), jnp.zeros((2, 6)))
    batch = lambda k: (sample_latents("normal", k, (64, 6)),)  # noqa: E731
    got = jax.jit(lambda key: standing_stats(generator, params, state, batch, key, passes))(key)

    def by_hand(k):
        x = np.asarray(sample_latents("normal", k, (64, 6)), np.float64) @ np.asarray(params["project"]["kernel"], np.float64)
        return x.reshape(-1, 4).mean(0), x.reshape(-1, 4).var(0)

    mean, variance = np.mean([by_hand(k) for k in jax.random.split(key, passes)], 0)
    stats = got["batch_stats"]["block1"]["norm1"]
    np.testing.assert_allclose(stats["mean"], mean, atol=1e-6)
    np.testing.assert_allclose(stats["var"], variance, rtol=1e-5)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    z = sample_latents("normal", jax.random.key(9), (512, 6))
    with_batch, _ = run(generator, params, state, z, train=True)
    with_standing, _ = run(generator, params, got, z, train=False)
    with_running, _ = run(generator, params, state, z, train=False)
    assert jnp.abs(with_standing - with_batch).mean() < 0.3 * jnp.abs(with_running - with_batch).mean()
    assert standing_stats(SNGANDiscriminator(), {}, {"spectral": 1}, None, key) == {"spectral": 1}
