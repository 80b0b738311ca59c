"""Networks of tokenizers: exact sizes, the pieces of VQGAN against torch, the order of patches."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import require_torch

from ssl_jax.errors import UserError
from ssl_jax.models import common
from ssl_jax.models.tokenizers import vit_vqgan, vqgan
from ssl_jax.models.tokenizers.networks import build_decoder, build_discriminator, build_encoder


def shapes(module, shape):
    """(number of parameters, shapes of the outputs)"""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    params, state = jax.eval_shape(lambda key, x: common.create(module, key, x), jax.random.key(0), x)
    out = jax.eval_shape(lambda p, s, x: common.run(module, p, s, x, train=False)[0], params, state, x)
    return sum(p.size for p in jax.tree.leaves(params)), jax.tree.map(lambda x: x.shape, out)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ------------------------------------------------------------------------------------------------------- ViT-VQGAN


def core(d, depth, hidden):
    """Positions, blocks with biases and two normalizations each, a last normalization."""
    block = 3 * d * d + 3 * d + d * d + d + 2 * d * hidden + hidden + d + 4 * d
    return 1024 * d + depth * block + 2 * d


WIDTHS = {"small": (512, 8, 2048), "base": (768, 12, 3072), "large": (1280, 32, 5120)}


@pytest.mark.full
@pytest.mark.parametrize(
    ("encoder", "decoder", "total"),
    [("small", "small", 55_426_816), ("base", "base", 179_820_032), ("small", "large", 666_797_056)],
)
def test_parameter_counts_of_vit_vqgan_sizes(encoder, decoder, total):
    """SS, BB and SL at 256 pixels, three channels, with the codebook: counted by hand; the paper gives no numbers."""
    d, depth, hidden = WIDTHS[encoder]
    encoder_count, out = shapes(build_encoder(dict(name="vit", size=encoder), 32, "float32"), (2, 256, 256, 3))
    expected = (192 * d + d) + core(d, depth, hidden) + (d * hidden + hidden + hidden * d + d) + (32 * d + 32) + 32
    assert encoder_count == expected
    assert (out["out"], out[f"layer{depth}"], out["features"]) == ((2, 32, 32, 32), (2, 32, 32, d), (2, 32, 32, d))
    d, depth, hidden = WIDTHS[decoder]
    decoder_count, image = shapes(build_decoder(dict(name="vit", size=decoder), 3, "float32"), (2, 32, 32, 32))
    assert decoder_count == (32 * d + d) + core(d, depth, hidden) + (d * hidden + hidden) + (hidden * 192 + 192)
    assert image == (2, 256, 256, 3)
    assert encoder_count + decoder_count + 8192 * 32 == total


@pytest.mark.full
def test_encoder_and_decoder_use_the_same_patch_order():
    x, p = normal(0, 2, 8, 12, 3), 4
    encoder = vit_vqgan.ViTEncoder(8, "mu", p)
    params, _ = common.create(encoder, jax.random.key(0), x)
    _, seen = encoder.apply({"params": params}, x, train=True, capture_intermediates=lambda module, _: module.name == "patch_embed")
    (tokens,) = seen["intermediates"]["patch_embed"]["__call__"]
    kernel = params["patch_embed"]["kernel"]
    for row, column in ((0, 0), (0, 2), (1, 1)):
        patch = x[:, p * row : p * row + p, p * column : p * column + p].reshape(2, -1)
        np.testing.assert_allclose(tokens[:, row, column], patch @ kernel, atol=1e-5)
    decoder = vit_vqgan.ViTDecoder(3, "mu", p)
    params, _ = common.create(decoder, jax.random.key(1), normal(1, 2, 2, 3, 8))
    params["head"] = {"kernel": 0 * params["head"]["kernel"], "bias": jnp.arange(48.0)}
    image, _ = common.run(decoder, params, {}, normal(1, 2, 2, 3, 8), train=True)
    np.testing.assert_array_equal(image, np.tile(np.arange(48.0).reshape(4, 4, 3), (2, 2, 3, 1)))


@pytest.mark.full
@pytest.mark.parametrize(("size", "alone"), [("patches", True), ("mu", False)])
def test_size_patches_encodes_each_patch_independently(size, alone):
    x = jnp.asarray(normal(0, 1, 12, 12, 1))
    encoder = vit_vqgan.ViTEncoder(8, size, 4)
    params, _ = common.create(encoder, jax.random.key(0), x)
    other = x.at[:, 4:8, 8:].add(1.0)
    before, after = (common.run(encoder, params, {}, images, train=True)[0]["out"] for images in (x, other))
    changed = np.abs(before - after).max((0, 3)) > 1e-6
    assert changed[1, 2]
    assert changed.sum() == (1 if alone else 9)


@pytest.mark.full
def test_layer_norm_before_codes_and_remat():
    x, outs = normal(0, 2, 8, 8, 3), {}
    for remat in ("none", "full"):
        encoder = build_encoder(dict(name="vit", size="mu", patch=4, remat=remat), 32, "float32")
        params, _ = jax.jit(lambda key, encoder=encoder: common.create(encoder, key, x))(jax.random.key(0))
        outs[remat] = common.run(encoder, params, {}, x, train=True)[0]["out"]
    np.testing.assert_allclose(outs["full"], outs["none"], atol=1e-6)
    assert set(params["norm"]) == {"bias"}
    np.testing.assert_allclose(np.linalg.norm(outs["none"], axis=-1), 32**0.5, rtol=1e-3)


def test_invalid_vit_vqgan_raises_user_error():
    with pytest.raises(UserError, match="patches of 4 pixels do not tile images of 10 x 8"):
        shapes(vit_vqgan.ViTEncoder(8, "mu", 4), (1, 10, 8, 3))
    with pytest.raises(UserError, match="has no size 'huge'; choose patches, mu, tiny, mini, small"):
        shapes(vit_vqgan.ViTDecoder(3, "huge", 4), (1, 2, 2, 8))


# ----------------------------------------------------------------------------------------------------------- VQGAN


def to_torch(params, name):
    """(weight, bias) of a convolution or linear layer, as a convolution of torch."""
    torch = require_torch()
    kernel = np.array(params[name]["kernel"])
    kernel = kernel[None, None] if kernel.ndim == 2 else kernel
    return torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()), torch.from_numpy(np.array(params[name]["bias"]))


def random_params(module, x, *train):
    """Random biases, scales and offsets, so that tests depend on them."""
    params = module.init(jax.random.key(0), x, *train)["params"]
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [leaf + 0.2 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)])


def group_norm(h, params, groups):
    torch = require_torch()
    scale, bias = (torch.from_numpy(np.array(params[name])) for name in ("scale", "bias"))
    return torch.nn.functional.group_norm(h, groups, scale, bias, eps=1e-6)


@pytest.mark.full
def test_residual_block_equals_pytorch():
    torch = require_torch()
    x = normal(0, 2, 4, 4, 64)
    block = vqgan.ResidualBlock(96, jnp.float32)
    params = random_params(block, x)
    h = torch.from_numpy(x).permute(0, 3, 1, 2)
    y = torch.conv2d(torch.nn.functional.silu(group_norm(h, params["norm1"], 32)), *to_torch(params, "conv1"), padding=1)
    y = torch.conv2d(torch.nn.functional.silu(group_norm(y, params["norm2"], 32)), *to_torch(params, "conv2"), padding=1)
    expected = (torch.conv2d(h, *to_torch(params, "shortcut")) + y).permute(0, 2, 3, 1)
    np.testing.assert_allclose(block.apply({"params": params}, x), expected, atol=2e-3)


@pytest.mark.full
def test_attention_block_equals_pytorch():
    torch = require_torch()
    x = normal(0, 2, 3, 5, 32)
    block = vqgan.AttentionBlock(jnp.float32)
    params = random_params(block, x)
    h = torch.from_numpy(x).permute(0, 3, 1, 2)
    query, key, value = (
        torch.conv2d(group_norm(h, params["norm"], 32), *to_torch(params, name)).flatten(2) for name in ("query", "key", "value")
    )
    weights = torch.softmax(query.transpose(1, 2) @ key / 32**0.5, -1)  # [B, positions, positions]
    attended = (value @ weights.transpose(1, 2)).reshape(h.shape)
    expected = (h + torch.conv2d(attended, *to_torch(params, "proj"))).permute(0, 2, 3, 1)
    np.testing.assert_allclose(block.apply({"params": params}, x), expected, atol=2e-4)


@pytest.mark.full
def test_parameter_counts_of_vqgan_at_16_fold_reduction():
    encoder_count, out = shapes(build_encoder(dict(name="vqgan"), 256, "float32"), (1, 256, 256, 3))
    decoder_count, image = shapes(build_decoder(dict(name="vqgan"), 3, "float32"), (1, 16, 16, 256))
    assert (out["out"], image) == ((1, 16, 16, 256), (1, 256, 256, 3))
    assert (out["layer1"], out["layer5"]) == ((1, 256, 256, 128), (1, 16, 16, 512))

    def norms(c):
        return 2 * c

    def conv(a, b, side=3):
        return side * side * a * b + b

    def block(a, b):
        return norms(a) + conv(a, b) + norms(b) + conv(b, b) + (conv(a, b, 1) if a != b else 0)

    def attention(c):
        return norms(c) + 4 * conv(c, c, 1)

    middle = 2 * block(512, 512) + attention(512)
    levels = [128, 128, 256, 256, 512]
    encoder = conv(3, 128) + sum(block(a, b) + block(b, b) for a, b in pairwise([128, *levels]))
    encoder += sum(conv(c, c) for c in levels[:-1]) + 2 * attention(512) + middle + norms(512) + conv(512, 256) + conv(256, 256, 1)
    decoder = conv(256, 256, 1) + conv(256, 512) + middle + 3 * attention(512) + norms(128) + conv(128, 3)
    decoder += sum(block(a, b) + 2 * block(b, b) for a, b in pairwise([512, *levels[::-1]]))
    decoder += sum(conv(c, c) for c in levels[1:])
    assert (encoder_count, decoder_count) == (encoder, decoder)


@pytest.mark.full
def test_downsampling_pads_right_and_bottom():
    torch = require_torch()
    x = normal(0, 1, 8, 8, 3)
    encoder = vqgan.VQGANEncoder(4, width=4, multiples=(1, 1), blocks=1, attention=(), features=4)
    params = random_params(encoder, x, True)
    out = encoder.apply({"params": params}, x, train=True, capture_intermediates=lambda module, _: module.name == "level1_down")
    (halved,) = out[1]["intermediates"]["level1_down"]["__call__"]
    h = torch.nn.functional.pad(torch.from_numpy(np.array(out[0]["layer1"])).permute(0, 3, 1, 2), (0, 1, 0, 1))
    expected = torch.conv2d(h, *to_torch(params, "level1_down"), stride=2).permute(0, 2, 3, 1)
    np.testing.assert_allclose(halved, expected, atol=1e-3)


@pytest.mark.full
def test_patch_discriminator_equals_pytorch():
    torch = require_torch()
    discriminator = build_discriminator(dict(name="patch"), 256, "float32")
    count, (logits, features) = shapes(discriminator, (2, 256, 256, 3))
    assert (count, logits, features["layer1"]) == (2_765_633, (2, 30, 30), (2, 128, 128, 64))
    small, x = vqgan.PatchDiscriminator(8, 1), normal(0, 3, 16, 16, 3)
    params, state = common.create(small, jax.random.key(0), x)
    (logits, _), new_state = common.run(small, params, state, x, train=True)
    h = torch.nn.functional.leaky_relu(torch.conv2d(torch.from_numpy(x).permute(0, 3, 1, 2), *to_torch(params, "conv0"), 2, 1), 0.2)
    kernel = torch.from_numpy(np.array(params["conv1"]["kernel"])).permute(3, 2, 0, 1)
    h = torch.nn.functional.batch_norm(torch.conv2d(h, kernel, None, 1, 1), None, None, training=True, eps=1e-5)
    h = h * torch.from_numpy(np.array(params["norm1"]["scale"]))[:, None, None]
    expected = torch.conv2d(torch.nn.functional.leaky_relu(h, 0.2), *to_torch(params, "score"), 1, 1)[:, 0]
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert not np.array_equal(new_state["batch_stats"]["norm1"]["mean"], state["batch_stats"]["norm1"]["mean"])
    style = build_discriminator(dict(name="stylegan2", channel_base=64, channel_max=8), 16, "float32")
    assert style.group == 1
