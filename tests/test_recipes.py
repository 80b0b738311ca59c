"""Recipes whose figure is quoted are the published ones: facts of papers and of their code, by which they once differed."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.data import geometry
from ssl_jax.engine import sharding
from ssl_jax.engine.optim import make_optimizer
from ssl_jax.errors import UserError
from ssl_jax.models.autoencoders import build_decoder
from ssl_jax.models.common import create, run
from ssl_jax.models.gan.networks import build_network
from ssl_jax.models.tokenizers.prior import MaskedPrior, Mlp, attention_with_dropout
from ssl_jax.objectives import contrastive
from ssl_jax.objectives.codebooks import LEARNED, build_quantizer
from ssl_jax.objectives.tokens import random_masks

pytestmark = pytest.mark.full


def load(name, variant):
    return importlib.import_module(f"configs.{name}").get_config(variant)


def rate(config, group, examples, epoch):
    """The learning rate in the middle of an epoch, counted from 0."""
    total = int(float(config.total.split()[0]) * examples) // config.batch_size
    params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    _, schedule = make_optimizer(group, dict(config.optim[group]), params, total, config.batch_size, examples)
    return float(schedule(round((epoch + 0.5) * examples / config.batch_size)))


# ---------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("gan", "cifar10"), ("gan", "cifar10_wgan_gp"), ("gan", "cifar10_sngan"), ("gan", "lsun_dcgan"), ("ssgan", "cifar10"),
        ("ssgan", "imagenet128"), ("stylegan", "cifar10"), ("stylegan", "cifar10_conditional"), ("vit_vqgan", "cnn_vqgan"),
        ("bigan", "imagenet64"), ("bigan", "imagenet112"), ("vqvae", "cifar10"),
    ],
)  # fmt: skip
def test_published_runs_without_mirrored_images(name, variant):
    config = load(name, variant)
    assert all("flip" not in arguments for _, arguments in config.data.ops)
    assert [operation for recipe in config.views for operation, _ in recipe if operation == "flip"] == []


@pytest.mark.parametrize(("name", "variant"), [("gan", "cifar10_dcgan"), ("stylegan", "ffhq1024"), ("supervised", "imagenet")])
def test_published_runs_with_mirrored_images(name, variant):
    assert load(name, variant).views == ((("flip", {"p": 0.5}),),)


@pytest.mark.parametrize(
    ("name", "variant", "resize", "crop"),
    [("bigan", "imagenet64", 72, 64), ("bigan", "imagenet112", 128, 112), ("vit_vqgan", "cnn_vqgan", 256, 256)],
)
def test_random_squares_of_the_resized_image(name, variant, resize, crop):
    config = load(name, variant)
    geometry.check_host_ops(config.data.ops)
    assert geometry.is_random(config.data.ops)
    assert geometry.output_shape(config.data.ops) == (crop, crop, 3)
    rng = np.random.default_rng(0)
    windows = [geometry.sample_windows(config.data.ops, 300, 600, rng)[0] for _ in range(500)]
    assert {window.size for window in windows} == {(resize, 2 * resize)}
    tops, lefts = np.array([window.part[:2] for window in windows]).T
    assert (tops.min(), tops.max()) == (0, resize - crop)
    assert lefts.min() <= 2
    assert 2 * resize - crop - 2 <= lefts.max() <= 2 * resize - crop


def test_random_square_is_checked():
    with pytest.raises(UserError, match="crop=9 > resize=8"):
        geometry.check_host_ops([("resize_random_crop", {"resize": 8, "crop": 9})])


def test_crops_of_compare_gan():
    """At least half of the image, square."""
    ops, rng = load("ssgan", "imagenet128").data.ops, np.random.default_rng(0)
    boxes = np.array([geometry.sample_windows(ops, 400, 500, rng)[0].box for _ in range(200)])
    assert (boxes[:, 2] == boxes[:, 3]).all()
    assert (boxes[:, 2] * boxes[:, 3] >= 0.5 * 400 * 500 - 500).all()


def test_dcgan_of_bedrooms_sees_the_whole_square():
    config = load("gan", "lsun_dcgan")
    assert config.data.ops == config.data.eval_ops == (("resize_crop", {"resize": 64, "crop": 64}),)


# ---------------------------------------------------------------- adversarial networks


def test_critic_of_wgan_gp_averages_over_pixels():
    """Gulrajani et al.: the score is a linear function of the mean over the 8 x 8 pixels of the last layer."""
    config = load("gan", "cifar10_wgan_gp")
    assert (config.model.generator.channels, config.model.discriminator.channels, config.model.fakes) == (256, 128, 1)
    critic = build_network("discriminator", {**config.model.discriminator, "channels": 8}, 32, 0, "float32")
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    params, state = create(critic, jax.random.key(1), x)
    (logits, features), _ = run(critic, params, state, x, train=False)
    assert features["layer4"].shape == (2, 8, 8, 8)
    mean = np.maximum(np.asarray(features["layer4"]), 0).mean((1, 2))
    np.testing.assert_allclose(logits, mean @ np.asarray(params["head"]["kernel"])[:, 0] + params["head"]["bias"][0], rtol=1e-5)
    # Miyato et al. sum over pixels: the same weights give 64 times the score.
    miyato = build_network("discriminator", {**config.model.discriminator, "channels": 8, "flavor": "miyato"}, 32, 0, "float32")
    weights = {**params, "head": {"kernel": params["head"]["kernel"]}}
    (sums, _), _ = run(miyato, weights, state, x, train=False)
    np.testing.assert_allclose(sums, 64 * logits, rtol=1e-4)


def test_ssgan_sees_as_many_rotated_images_as_mimicry():
    config = load("ssgan", "cifar10")
    assert 4 * config.model.rotated == config.batch_size // config.model.discriminator_steps == 64


# ---------------------------------------------------------------- autoencoders and tokenizers


def test_rates_of_iwae():
    """Burda et al.: stage i = 0 .. 7 of 3^i epochs with the rate 1e-3 x 10^(-i / 7)."""
    config, start = load("vae", "mnist_iwae"), 0
    for stage in range(8):
        for epoch in {start, start + 3**stage - 1}:
            assert rate(config, "net", 60_000, epoch) == pytest.approx(1e-3 * 10 ** (-stage / 7), rel=1e-4)
        start += 3**stage
    assert config.total == f"{start} epochs"


def test_biases_of_iwaes_pixels_start_at_the_logit_of_the_mean():
    decoder = build_decoder(load("vae", "mnist_iwae").model.decoder, (28, 28, 1), "float32")
    params, _ = create(decoder, jax.random.key(0), jnp.zeros((1, 50)))
    np.testing.assert_allclose(jax.nn.sigmoid(params["image"]["bias"]), 0.1307, atol=1e-5)  # MNIST's mean pixel
    assert not params["linear1"]["bias"].any()


def test_codes_of_the_vqvae_start_like_sonnets():
    """VarianceScaling of 64 inputs, uniform: standard deviation 1/8, none above sqrt(3) / 8."""
    quantizer = build_quantizer(load("vqvae", "cifar10").model.quantizer)
    codes = quantizer.init(jax.random.key(0))[1]["codebook"]
    assert codes.shape == (512, 64)
    assert float(codes.std()) == pytest.approx(1 / 8, rel=0.01)
    assert float(jnp.abs(codes).max()) == pytest.approx(math.sqrt(3) / 8, rel=0.01)


def test_losses_of_vqgan():
    """taming-transformers: absolute error of images in [-1, 1]; mean((sg(e) - z)^2) + .25 mean((e - sg(z))^2)."""
    model = load("vit_vqgan", "cnn_vqgan").model
    assert (model.absolute, model.squared, model.logit_laplace, model.perceptual.weight) == (2.0, 0.0, 0.0, 1.0)
    quantizer = build_quantizer({**model.quantizer, "size": 16, "dim": 4})
    params, state = quantizer.init(jax.random.key(0))
    z = jax.random.normal(jax.random.key(1), (5, 4))
    chosen = quantizer.tokens(params, state, z)

    def loss(params, z):
        return quantizer.train(params, state, z, jax.random.key(2), 0).loss

    def published(params, z):
        code, stop = params["codebook"][chosen], jax.lax.stop_gradient
        return jnp.mean((stop(code) - z) ** 2) + 0.25 * jnp.mean((code - stop(z)) ** 2)

    for ours, theirs in zip(*(jax.tree.leaves(jax.value_and_grad(f, (0, 1))(params, z)) for f in (loss, published)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_quantizers_of_earlier_configs_weigh_the_codebook_loss_by_one():
    z = jax.random.normal(jax.random.key(1), (5, 4))
    losses = []
    for extra in ({}, {"codebook_weight": 1.0}):
        quantizer = build_quantizer({"name": "learned", **LEARNED, "size": 16, "dim": 4, **extra})
        params, state = quantizer.init(jax.random.key(0))
        losses.append(float(quantizer.train(params, state, z, jax.random.key(2), 0).loss))
    assert losses[0] == losses[1]


# ---------------------------------------------------------------- classifiers and SimCLR


def test_simclr_is_the_command_of_the_readme():
    for variant in ("imagenet", "imagenet_v1", "imagenet_v2", "imagenet_v2_sk", "cifar10_simclr"):
        assert load("simclr", variant).model.loss == "nt_xent_sum"
    readme, paper = load("simclr", "imagenet"), load("simclr", "imagenet_v1")
    assert (readme.total, readme.optim.net.weight_decay, readme.model.head.widths) == ("100 epochs", 1e-4, (2048, 2048, 128))
    assert (paper.total, paper.optim.net.weight_decay, paper.model.head.widths) == ("1000 epochs", 1e-6, (2048, 128))
    for config, style in ((readme, "simclr_v2"), (paper, "simclr_v1")):
        assert dict(config.views[0])["color_jitter"]["style"] == style
        assert rate(config, "net", 1_281_167, 10) == pytest.approx(4.8, rel=1e-3)  # after ten epochs of warm-up


def test_the_sum_over_views_doubles_the_updates_that_lars_does_not_adapt():
    z = jax.random.normal(jax.random.key(0), (6, 2, 8))
    loss, total = (contrastive.loss_of_views(name, 0.5, "dense") for name in ("nt_xent", "nt_xent_sum"))
    np.testing.assert_allclose(total(z)[0], 2 * loss(z)[0], rtol=1e-6)
    assert total(z)[1]["accuracy"] == loss(z)[1]["accuracy"]
    config = load("simclr", "imagenet")
    params = {"kernel": jnp.ones((3, 2)), "scale": jnp.ones(2)}
    spec = {**config.optim.net, "weight_decay": 0.0, "warmup": "0 steps"}
    optimizer, _ = make_optimizer("net", spec, params, 100, 4096, 1_281_167)

    def update(factor):
        grads = jax.tree.map(lambda x: factor * jnp.arange(1.0, x.size + 1).reshape(x.shape), params)
        return optimizer.update(grads, optimizer.init(params), params, step=0)[0]

    once, twice = update(1.0), update(2.0)
    np.testing.assert_allclose(twice["kernel"], once["kernel"], rtol=1e-5)
    np.testing.assert_allclose(twice["scale"], 2 * once["scale"], rtol=1e-5)


def test_supervised_is_torchvisions_recipe():
    config = load("supervised", "imagenet")
    assert (config.batch_size, config.model.smoothing, config.model.encoder.zero_init_residual) == (256, 0.0, False)
    assert config.optim.net.get("nesterov", False) is False
    assert config.optim.net.weight_decay_mask == ((".*", 1.0),)
    rates = [rate(config, "net", 1_281_167, epoch) for epoch in (0, 29, 30, 59, 60, 89)]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-5)


def test_fine_tuning_has_simclrs_crops():
    config = load("supervised", "imagenet_10pct")
    assert config.data.ops[0][1]["sampling"] == "simclr"
    assert rate(config, "net", 128_116, 0) == pytest.approx(0.16, rel=0.01)
    assert config.batch_size == 1024


def test_fine_tuning_of_mae_has_the_published_rates():
    """From 0 to 5e-4 x 1024 / 256 in 5 epochs, to 1e-6 at the end of 100; by layer, as MAE's code; biases and norms do not decay."""
    config = load("supervised", "vit_b16_mae")
    alike = config.copy_and_resolve_references()
    with alike.unlocked():
        del alike.optim.net["lr_multipliers"], alike.optim.net["weight_decay_mask"]
    rates = [rate(alike, "net", 1_281_167, epoch) for epoch in (-0.5, 2, 4.5, 99.5)]
    np.testing.assert_allclose(rates, [0, 1e-3, 2e-3, 1e-6], rtol=2e-3, atol=1e-7)
    assert config.model.mix.to_dict() == dict(mixup=0.8, cutmix=1.0, p=1.0, switch=0.5)
    assert (config.model.smoothing, config.model.drop_path, config.model.head_std) == (0.1, 0.1, 2e-5)
    names = ["net/encoder/patch_embed/kernel", "net/encoder/block0/mlp/fc1/bias", "net/encoder/block11/norm1/scale",
             "net/encoder/cls_token", "net/classifier/kernel"]  # fmt: skip
    multipliers = sharding.match(config.optim.net.lr_multipliers, names, "rules", all_used=False)
    np.testing.assert_allclose(multipliers, [0.65**13, 0.65**12, 0.65, 0.65**13, 1])
    assert sharding.match(config.optim.net.weight_decay_mask, names, "mask", all_used=False) == [1, 0, 0, 0, 1]
    one_percent = load("supervised", "imagenet_1pct")
    assert (one_percent.total, one_percent.data.name) == ("60 epochs", "imagenet2012_subset/1pct")


# ---------------------------------------------------------------- MaskGIT


def test_maskgit_masks_at_least_half():
    config = load("maskgit", "imagenet256")
    masks = np.asarray(random_masks(jax.random.key(0), (2000, 256), "cosine", config.model.least_masked))
    share = masks.mean(1)
    assert share.min() == 0.5
    assert (share == 0.5).mean() == pytest.approx(1 / 3, abs=0.04)  # cos(r pi / 2) < 1/2 for r > 2/3
    plain = np.asarray(random_masks(jax.random.key(0), (2000, 256), "cosine")).mean(1)
    np.testing.assert_array_equal(share[plain > 0.5], plain[plain > 0.5])


def test_maskgits_transformer_is_berts():
    """Against NumPy: normalization after the residuals with 1e-12, GELU by its tanh approximation."""
    transformer = load("maskgit", "imagenet256").model.transformer
    assert (transformer.flavor, transformer.depth, transformer.width, transformer.hidden) == ("maskgit", 24, 768, 3072)
    width, heads = 8, 2
    model = MaskedPrior(codes=5, length=4, depth=1, width=width, heads=heads, hidden=16, dropout=0.1, flavor="maskgit")
    tokens, label = jnp.array([[0, 5, 2, 4]]), jnp.array([0])
    params, _ = create(model, jax.random.key(0), tokens, label, train=False)
    large = {"fc1": 40.0, "fc2": 40.0}  # so that the two GELUs differ; the small transform shows the 1e-12
    params = jax.tree_util.tree_map_with_path(lambda path, x: x * math.prod(large.get(k.key, 1.0) for k in path), params)
    (logits, _), _ = run(model, params, {}, tokens, label, train=False)

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]

    def dense(x, p):
        return x @ p["kernel"] + p["bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    block = jax.tree.map(lambda x: x[0], p["blocks"])
    x = np.concatenate([p["labels"]["embedding"][:1], p["tokens"]["embedding"][np.asarray(tokens[0])]])
    x = norm(x + p["position"], p["norm"])
    qkv = dense(x, block["attention"]["qkv"]).reshape(5, heads, 3, width // heads)
    q, k, v = (qkv[:, :, i] for i in range(3))
    scores = np.exp(np.einsum("nhd,mhd->hnm", q, k) / np.sqrt(width / heads))
    y = np.einsum("hnm,mhd->nhd", scores / scores.sum(-1, keepdims=True), v).reshape(5, width)
    x = norm(x + dense(y, block["attention"]["proj"]), block["norm1"])
    x = norm(x + dense(gelu(dense(x, block["mlp"]["fc1"])), block["mlp"]["fc2"]), block["norm2"])
    x = norm(gelu(dense(x[1:], p["transform"])), p["transform_norm"])
    np.testing.assert_allclose(logits[0], x @ p["tokens"]["embedding"][:5].T + p["bias"], rtol=1e-4, atol=2e-6)


def test_maskgit_drops_weights_of_the_attention_and_no_activations():
    q = jnp.zeros((2, 4, 1, 3))
    ones = jnp.ones((2, 4, 1, 3))
    out = attention_with_dropout(q, q, ones, False, 0.5, jax.random.key(0))  # each weight is 1/4, dropped or doubled
    assert set(np.unique(out)) <= {0.0, 0.5, 1.0, 1.5, 2.0}
    assert len(np.unique(out[..., 0])) > 1
    np.testing.assert_array_equal(out[..., 0], out[..., 2])  # a dropped weight drops all channels of a position
    x = jax.random.normal(jax.random.key(1), (1, 3, 4))
    for flavor, same in (("maskgit", True), ("vim", False)):
        mlp = Mlp(8, 0.5, flavor, jnp.float32)
        params = mlp.init(jax.random.key(0), x, None)
        assert bool(jnp.array_equal(mlp.apply(params, x, None), mlp.apply(params, x, jax.random.key(2)))) is same


def test_an_unknown_flavor_is_one_line():
    with pytest.raises(UserError, match="choose one of vim, maskgit"):
        MaskedPrior(codes=5, length=4, flavor="bert")


def test_the_published_figure_of_bigan_is_of_the_larger_encoder():
    variants = {variant.name: variant for variant in importlib.import_module("configs.bigan").VARIANTS}
    assert "52.5" not in variants["imagenet64"].expected
    assert "52.5" in variants["imagenet112"].expected
