"""VQ-VAE: published network sizes, the loss written out, tokens, codebooks as parameters or moving averages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import require_torch

from ssl_jax.engine.method import State
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.methods import vqvae as subject
from ssl_jax.models import common
from ssl_jax.models.tokenizers import networks
from ssl_jax.models.tokenizers.vqvae import ResidualStack


def load(variant="smoke", size=16):
    config = configs.load(f"configs/vqvae.py:{variant}", ())
    with config.unlocked():
        config.dtype, config.data.image_shape = "float32", (size, size, 3)
        config.views = ((),)
    return config


def begin(config, batch=8):
    method = subject.build(config, {})
    images = np.random.default_rng(0).integers(0, 256, (batch, *config.data.image_shape), np.uint8)
    params, mutable = jax.jit(method.init)(jax.random.key(0), {"image": images}, {})
    fns = jax.tree.map(jax.jit, method.fns)
    return method._replace(encode=jax.jit(method.encode), fns=fns), State(jnp.zeros((), jnp.int32), params, {}, mutable, {}), images


def test_parameter_counts_equal_sonnets_example():
    """Encoder: 4x4 3->64, 4x4 64->128, 3x3 128->128, twice 3x3 128->32 and 1x1 32->128, 1x1 128->64; the decoder mirrors it."""
    config = load("cifar10", 32)
    method = subject.build(config, {})
    batch = {"image": jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.uint8)}
    params, mutable = jax.eval_shape(method.init, jax.random.key(0), batch, {})
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    stack = 2 * (9 * 128 * 32 + 32 + 32 * 128 + 128)
    encoder = (16 * 3 * 64 + 64) + (16 * 64 * 128 + 128) + (9 * 128 * 128 + 128) + stack + (128 * 64 + 64)
    decoder = (9 * 64 * 128 + 128) + stack + (16 * 128 * 64 + 64) + (16 * 64 * 3 + 3)
    assert (count(params["net"]["encoder"]), count(params["net"]["decoder"])) == (encoder, decoder) == (372_416, 290_307)
    assert params["net"]["quantizer"] == {}
    assert mutable["codebook"]["codebook"].shape == (512, 64)
    tokens = jax.eval_shape(method.fns.tokens, params, mutable, batch["image"])
    assert (tokens.shape, tokens.dtype) == ((2, 8, 8), jnp.int32)


def test_residual_stack_equals_pytorch():
    torch = require_torch()
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 8)).astype(np.float32)
    stack = ResidualStack(4, 2, jnp.float32)
    variables = stack.init(jax.random.key(0), x)
    h = torch.from_numpy(x).permute(0, 3, 1, 2)
    for i in (1, 2):
        w1, w2 = (
            torch.from_numpy(np.array(variables["params"][f"block{i}_conv{j}"]["kernel"])).permute(3, 2, 0, 1) for j in (1, 2)
        )
        h = h + torch.conv2d(torch.conv2d(h.relu(), w1, padding=1).relu(), w2)
    np.testing.assert_allclose(stack.apply(variables, x), h.relu().permute(0, 2, 3, 1), atol=1e-5)


@pytest.fixture(scope="module")
def learned():
    """A gradient codebook of unit codes, with the loss compiled once."""
    quantizer = dict(name="learned", size=32, dim=8, normalize=True)
    config = load()
    with config.unlocked():
        config.model.quantizer = quantizer
    method, state, images = begin(config)
    train = jax.jit(jax.value_and_grad(method.phases[0].loss, has_aux=True))
    return config, method, state, images, train(state.params, state, {"image": images}, jax.random.key(1))


@pytest.mark.full
def test_loss_equals_the_paper_written_out(learned):
    """|x - decode(codes)|^2 / variance + |sg(z) - e|^2 + beta |z - sg(e)|^2, written out with the networks."""
    config, method, state, images, ((loss, (update, logs)), grads) = learned
    net, x = state.params["net"], images.astype(np.float32) / 255
    encoder = networks.build_encoder(config.model.encoder, 8, "float32")
    decoder = networks.build_decoder(config.model.decoder, 3, "float32")
    run = jax.jit(common.run, static_argnums=0, static_argnames="train")
    z = np.asarray(run(encoder, net["encoder"], {}, x - 0.5, train=True)[0]["out"])
    z = z / np.linalg.norm(z, axis=-1, keepdims=True)
    codes = np.asarray(net["quantizer"]["codebook"])
    codes = codes / np.linalg.norm(codes, axis=-1, keepdims=True)
    e = codes[(z @ codes.T).argmax(-1)]
    reconstructed = run(decoder, net["decoder"], {}, e, train=True)[0] + 0.5
    error = np.mean((reconstructed - x) ** 2)
    np.testing.assert_allclose(logs["squared_error"], error, rtol=1e-5)
    np.testing.assert_allclose(loss, error / 0.0625 + 1.25 * np.mean((z - e) ** 2), rtol=1e-5)
    assert update == {"codebook": {}}
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads["net"]["encoder"]))  # straight through the look-up
    assert not method.couples_batch


@pytest.mark.full
def test_tokens_decode_to_the_reconstruction(learned):
    _, method, state, images, _ = learned
    tokens = method.fns.tokens(state.params, state.mutable, images)
    assert (tokens.shape, tokens.dtype) == ((8, 4, 4), jnp.int32)
    decoded = method.fns.decode(state.params, state.mutable, tokens)
    reconstructed = method.fns.reconstruct(state.params, state.mutable, images)
    np.testing.assert_array_equal(decoded, reconstructed)
    assert (reconstructed.shape, reconstructed.dtype) == (images.shape, jnp.float32)
    assert reconstructed.min() >= 0
    assert reconstructed.max() <= 1
    codebook = method.fns.codebook(state.params, state.mutable)
    np.testing.assert_allclose(np.linalg.norm(codebook, axis=-1), 1, rtol=1e-5)
    as_float = method.fns.tokens(state.params, state.mutable, (images / 255).astype(np.float32))
    np.testing.assert_array_equal(as_float, tokens)
    features = method.encode(state.params, state.mutable, images)
    np.testing.assert_allclose(features["pooled"], features["features"].mean((1, 2)), rtol=1e-5)
    assert features["out"].shape == (8, 4, 4, 8)


@pytest.mark.full
def test_moving_average_codebook_and_grayscale_images():
    config = load("mnist_t10k_revival", 8)
    with config.unlocked():
        config.model.quantizer.update(size=16, dim=4)
        for part in ("encoder", "decoder"):
            config.model[part].update(width=8, block_width=4, stages=1)
    method, state, images = begin(config, 16)
    assert method.couples_batch
    assert state.params["net"]["quantizer"] == {}
    loss = jax.jit(method.phases[0].loss)
    (_, (update, logs)), key = loss(state.params, state, {"image": images}, jax.random.key(1)), jax.random.key(1)
    before, after = state.mutable["codebook"], update["codebook"]
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, before)
    np.testing.assert_allclose(after["count"].sum(), 0.99 * 16 + 0.01 * 16 * 16, rtol=1e-5)
    z = method.encode(state.params, state.mutable, images)["out"]
    tokens = method.fns.tokens(state.params, state.mutable, images)
    one = np.bincount(np.ravel(tokens), minlength=16)
    used = one > 0
    mean = np.stack([np.asarray(z)[np.asarray(tokens) == k].mean(0) for k in np.flatnonzero(used)])
    n = 0.01 * one[used, None]
    expected = (0.99 * before["codebook"][used] + n * mean) / (0.99 + n)
    np.testing.assert_allclose(after["codebook"][used], expected, rtol=1e-3, atol=1e-4)
    assert logs["usage_of_batch"] == used.mean()
    reconstructed = method.fns.reconstruct(state.params, state.mutable, images)
    np.testing.assert_array_equal(reconstructed[..., 0], reconstructed[..., 2])
    step, other = state._replace(step=jnp.int32(9)), loss(state.params, state, {"image": images}, key)[0]
    np.testing.assert_array_equal(loss(state.params, step, {"image": images}, key)[0], other)


def test_unknown_network_or_field_raises_user_error():
    with pytest.raises(UserError, match=r"config.model.encoder.name has no 'conv'; valid: residual, vqgan, vit"):
        networks.build_encoder(dict(name="conv"), 8, "float32")
    with pytest.raises(UserError, match=r"config.model.decoder \(residual\) has no 'depth'; .*valid: width, stages"):
        networks.build_decoder(dict(name="residual", depth=2), 3, "float32")
