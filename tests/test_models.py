"""Shapes, sizes, numerics types and error messages of the modules; parity with PyTorch is in test_torch_layout.py."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ssl_jax.errors import UserError
from ssl_jax.models import common
from ssl_jax.models.backbones import resnet, vit
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.heads import LinearHead, ProjectionHead

R10_SMALL = {"name": "resnet", "depth": 10, "width": 0.25, "stem": "cifar"}


def abstract_variables(module, *shape):
    init = functools.partial(common.init_variables, module, train=False)  # faster to trace
    return jax.eval_shape(init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


def init(module, x):
    return jax.jit(functools.partial(common.init_variables, module))(jax.random.key(1), x)


def residual_block(flavor="torchvision", **fields):
    defaults = {"stride": 2, "bottleneck": False, "always_project": True, "sk": False, "zero_init_residual": True}
    fields = {**defaults, "kernel_init": resnet.KERNEL_INITS[flavor], "dtype": jnp.float32, **fields}
    return resnet.Block(**fields)


@functools.cache
def small_vit():
    """(module, params, images): one block of width 32 on 2x2 patches."""
    module, x = build_encoder({"name": "vit", "variant": "mu/8"}), images(8, 16)
    return module, init(module, x)[0], x


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def images(batch=2, size=32, seed=0):
    return jax.random.uniform(jax.random.key(seed), (batch, size, size, 3))


# Trainable parameters without classifier. The sources are torchvision, google-research/simclr and, to the rounding
# given there, the tables of SimCLR v2 (with statistics) and BYOL.
RESNET_COUNTS = [
    ({"depth": 18}, 11_176_512),
    ({"depth": 18, "stem": "cifar"}, 11_168_832),
    ({"depth": 18, "flavor": "simclr"}, 11_180_736),
    ({"depth": 18, "flavor": "simclr", "stem": "cifar"}, 11_173_056),
    ({"depth": 50}, 23_508_032),
    ({"depth": 50, "flavor": "simclr"}, 23_508_032),
    ({"depth": 50, "stem": "cifar"}, 23_500_352),
    ({"depth": 50, "width": 2.0}, 93_907_072),
    ({"depth": 50, "width": 4.0}, 375_378_176),
    ({"depth": 50, "flavor": "simclr", "sk": True}, 35_215_584),
    ({"depth": 50, "flavor": "simclr", "sk": True, "width": 2.0}, 140_306_048),
    ({"depth": 101}, 42_500_160),
    ({"depth": 101, "width": 2.0}, 169_771_136),
    ({"depth": 101, "flavor": "simclr", "sk": True}, 64_662_304),
    ({"depth": 101, "flavor": "simclr", "sk": True, "width": 2.0}, 257_132_224),
    ({"depth": 152}, 58_143_808),
    ({"depth": 152, "width": 2.0}, 232_253_568),
    ({"depth": 152, "flavor": "simclr", "sk": True}, 88_940_896),
    ({"depth": 152, "flavor": "simclr", "sk": True, "width": 2.0}, 353_398_528),
    ({"depth": 152, "flavor": "simclr", "sk": True, "width": 3.0}, 794_704_160),
    ({"depth": 200}, 62_624_832),
    ({"depth": 200, "width": 2.0}, 250_128_512),
]


@pytest.mark.full
@pytest.mark.parametrize(("fields", "expected"), RESNET_COUNTS, ids=str)
def test_resnet_parameter_counts(fields, expected):
    module = build_encoder({"name": "resnet", **fields})
    params, _ = abstract_variables(module, 1, 32, 32, 3)
    assert count(params) == expected


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("Ti/16", 5_524_416),
        ("S/16", 21_665_664),
        ("B/16", 85_798_656),
        ("L/16", 303_301_632),
        ("H/14", 630_764_800),
        # 40 blocks of 4 D^2 + 2 D F weights, biases and norms, the patches, class token and 257 positions, one norm
        ("g/14", 40 * (4 * 1408**2 + 2 * 1408 * 6144 + 6144 + 9 * 1408) + (588 + 1 + 1 + 257 + 2) * 1408),
    ],
)
@pytest.mark.full
def test_vit_parameter_counts(variant, expected):
    params, batch_stats = abstract_variables(build_encoder({"name": "vit", "variant": variant}), 1, 224, 224, 3)
    assert count(params) == expected
    assert batch_stats == {}


def test_resnet50_number_of_bias_and_norm_parameters():
    params, _ = abstract_variables(build_encoder({"name": "resnet", "depth": 50}), 1, 32, 32, 3)
    assert sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 1) == 53_120


@pytest.mark.parametrize(
    ("widths", "expected"), [((2048, 128), 4_460_672), ((2048, 2048, 128), 8_659_072)], ids=["simclr v1", "simclr v2"]
)
def test_projection_head_counts(widths, expected):
    params, _ = abstract_variables(ProjectionHead(widths), 4, 2048)
    assert count(params) == expected
    assert set(params[f"bn{len(widths)}"]) == {"scale"}


@pytest.mark.parametrize(
    ("fields", "biases", "norms"),
    [
        ({}, [False, False], [{"scale", "bias"}, {"scale"}]),  # SimCLR
        ({"last_scale": False}, [False, False], [{"scale", "bias"}, set()]),  # SimSiam projector
        ({"last_batch_norm": False, "last_bias": True}, [False, True], [{"scale", "bias"}, None]),  # SimSiam predictor
        ({"bias": True, "last_bias": False, "last_batch_norm": False}, [True, False], [{"scale", "bias"}, None]),
        ({"last_batch_norm": False}, [False, False], [{"scale", "bias"}, None]),  # Barlow Twins, VICReg
        ({"batch_norm": False}, [True, True], [None, None]),  # MoCo v2
    ],
)
def test_projection_head_variants(fields, biases, norms):
    params, batch_stats = abstract_variables(ProjectionHead((8, 4), **fields), 4, 6)
    assert ["bias" in params[f"linear{i}"] for i in (1, 2)] == biases
    for name, expected in zip(("bn1", "bn2"), norms, strict=True):
        assert (name in batch_stats) == (expected is not None)
        assert set(params.get(name, {})) == (expected or set())


def test_projection_head_against_a_float64_loop():
    head = ProjectionHead((5, 3), kernel_std=0.01)
    x = jax.random.normal(jax.random.key(0), (16, 7)) + 1
    params, batch_stats = init(head, x)
    params["bn1"]["scale"], params["bn1"]["bias"] = jnp.linspace(0.5, 2, 5), jnp.linspace(-1, 1, 5)
    out, new_stats = jax.jit(functools.partial(common.apply, head, train=True))(params, batch_stats, x)

    h = np.asarray(x, np.float64)
    np.testing.assert_array_equal(out[0], x)
    for i, relu in ((1, True), (2, False)):
        h = h @ np.asarray(params[f"linear{i}"]["kernel"], np.float64)
        mean, var = h.mean(0), h.var(0)
        np.testing.assert_allclose(new_stats[f"bn{i}"]["mean"], 0.1 * mean, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(new_stats[f"bn{i}"]["var"], 0.9 + 0.1 * var, rtol=1e-5)
        h = (h - mean) / np.sqrt(var + 1e-5) * np.asarray(params[f"bn{i}"]["scale"], np.float64)
        if relu:
            h = np.maximum(h + np.asarray(params[f"bn{i}"]["bias"], np.float64), 0)
        np.testing.assert_allclose(out[i], h, atol=2e-3)  # E[x^2] - E[x]^2 in float32 on a variance near epsilon
    assert abs(float(params["linear1"]["kernel"].std()) - 0.01) < 0.004


def test_linear_head_starts_at_zero():
    head = LinearHead(3)
    x = jnp.ones((2, 4), jnp.bfloat16)
    params, _ = common.init_variables(head, jax.random.key(0), x)
    logits, _ = common.apply(head, params, {}, x, train=False)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, np.zeros((2, 3)))
    random, _ = common.init_variables(LinearHead(3, zero_init=False), jax.random.key(0), x)
    assert float(jnp.abs(random["kernel"]).min()) > 0


def feature_shapes(sides, channels):
    names = ("stem", "layer1", "layer2", "layer3", "layer4")
    shapes = {name: (side, side, width) for name, side, width in zip(names, sides, channels, strict=True)}
    return {**shapes, "pooled": (channels[-1],)}


SK = {"depth": 50, "width": 0.25, "flavor": "simclr", "sk": True}


@pytest.mark.parametrize(
    ("spec", "size", "expected"),
    [
        ({"name": "resnet", "depth": 10}, 65, feature_shapes((17, 17, 9, 5, 3), (64, 64, 128, 256, 512))),
        ({"name": "resnet", **SK}, 65, feature_shapes((17, 17, 9, 5, 3), (16, 64, 128, 256, 512))),
        (R10_SMALL, 32, feature_shapes((32, 32, 16, 8, 4), (16, 16, 32, 64, 128))),
        (
            {"name": "vit", "variant": "mu/8", "registers": 4},
            32,
            {"block0": (21, 32), "tokens": (21, 32), "patches": (4, 4, 32), "pooled": (32,)},
        ),
        (
            {"name": "vit", "variant": "mu/8", "pool": "gap"},
            32,
            {"block0": (16, 32), "tokens": (16, 32), "patches": (4, 4, 32), "pooled": (32,)},
        ),
        ({"name": "mlp", "widths": (20, 10)}, 8, {"layer1": (20,), "layer2": (10,), "pooled": (10,)}),
    ],
    ids=["resnet", "selective kernels", "cifar stem", "vit", "vit gap", "mlp"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.full
def test_feature_shapes_and_dtypes(spec, size, expected, dtype):
    module = build_encoder(spec, dtype)
    variables = abstract_variables(module, 2, size, size, 3)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    run = functools.partial(common.apply, module, train=True)
    out, new_stats = jax.eval_shape(run, *variables, jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32))
    assert {name: leaf.shape[1:] for name, leaf in out.items()} == expected
    assert {leaf.shape[0] for leaf in out.values()} == {2}
    assert out.pop("pooled").dtype == jnp.float32
    assert {leaf.dtype for leaf in out.values()} == {jnp.dtype(dtype)}
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_stats) == jax.tree.map(
        lambda x: (x.shape, x.dtype), variables[1]
    )


def test_residual_block_in_bfloat16_is_close_to_float32():
    x = jax.random.uniform(jax.random.key(0), (4, 8, 8, 16))
    variables = init(residual_block(channels=16), x)
    out = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        run = functools.partial(common.apply, residual_block(channels=16, dtype=dtype), train=True)
        out[dtype], _ = jax.jit(run)(*variables, x)
    assert out[jnp.bfloat16].dtype == jnp.bfloat16
    scale = float(jnp.abs(out[jnp.float32]).mean())
    error = float(jnp.abs(out[jnp.bfloat16] - out[jnp.float32]).mean())
    assert 0 < error < 0.02 * scale


def test_batch_norm_statistics_change_only_in_training():
    module = build_encoder({"name": "mlp", "widths": (5,)})
    x = images(8, 4)
    params, batch_stats = common.init_variables(module, jax.random.key(0), x)
    out, same = common.apply(module, params, batch_stats, x, train=False)
    assert same is batch_stats
    out_train, new_stats = common.apply(module, params, batch_stats, x, train=True)
    y = np.asarray(x, np.float64).reshape(8, -1) @ np.asarray(params["linear1"]["kernel"], np.float64)
    np.testing.assert_allclose(new_stats["bn1"]["mean"], 0.1 * y.mean(0), atol=1e-6)
    np.testing.assert_allclose(new_stats["bn1"]["var"], 0.9 + 0.1 * y.var(0), atol=1e-6)
    np.testing.assert_allclose(out["pooled"], np.maximum(y / np.sqrt(1 + 1e-5), 0), atol=1e-5)
    expected = np.maximum((y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5), 0)
    np.testing.assert_allclose(out_train["pooled"], expected, atol=1e-4)


def test_zero_init_residual_blocks_start_as_identity():
    x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 16))
    for zero in (True, False):
        module = residual_block(channels=16, stride=1, always_project=False, zero_init_residual=zero)
        out, _ = jax.jit(functools.partial(common.apply, module, train=True))(*init(module, x), x)
        assert bool(jnp.array_equal(out, x)) == zero


@pytest.mark.parametrize(("flavor", "gain", "fan"), [("torchvision", 2.0, "out"), ("simclr", 1.0, "in")])
def test_resnet_initializers(flavor, gain, fan):
    params, _ = init(residual_block(flavor, channels=128), jnp.ones((1, 4, 4, 64)))
    kernel = params["conv1"]["kernel"]  # 3x3, 64 -> 128
    expected = np.sqrt(gain / (9 * (128 if fan == "out" else 64)))
    assert abs(float(kernel.std()) / expected - 1) < 0.02
    assert (float(jnp.abs(kernel).max()) < 2.4 * expected) == (flavor == "simclr")  # truncated at two sigma


@pytest.mark.full
def test_selective_kernel_block_against_a_float64_loop():
    """A block of stride 2 on an odd size, where the shortcut's average counts padded zeros."""
    module = residual_block("simclr", channels=32, bottleneck=True, sk=True)
    x = jax.random.normal(jax.random.key(2), (2, 5, 5, 64))
    params, batch_stats = init(module, x)
    params["bn3"]["scale"] = jnp.linspace(0.5, 1.5, 128)
    out, _ = jax.jit(functools.partial(common.apply, module, train=False))(params, batch_stats, x)
    block = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = np.asarray(x, np.float64)

    norm = 1 / np.sqrt(1 + 1e-5)  # untrained running statistics
    h = np.maximum(x @ block["conv1"]["kernel"][0, 0] * norm, 0)
    streams = np.maximum(_conv3x3_stride2(h, block["conv2"]["kernel"]) * norm, 0)
    first, second = streams[..., :32], streams[..., 32:]
    context = (first + second).mean((1, 2))
    context = np.maximum(context @ block["sk_squeeze"]["kernel"][0, 0] * norm, 0)
    assert context.shape[-1] == 32  # not 32 * 0.0625
    logits = context @ block["sk_mix"]["kernel"][0, 0]
    weight = 1 / (1 + np.exp(logits[:, 32:] - logits[:, :32]))[:, None, None]
    h = (first * weight + second * (1 - weight)) @ block["conv3"]["kernel"][0, 0] * norm * block["bn3"]["scale"]

    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    pooled = sum(padded[:, i : i + 5 : 2, j : j + 5 : 2] for i in (0, 1) for j in (0, 1)) / 4
    expected = np.maximum(h + pooled @ block["shortcut_conv"]["kernel"][0, 0] * norm, 0)
    np.testing.assert_allclose(out, expected, atol=1e-4)


def _conv3x3_stride2(x, kernel):
    size = x.shape[1]
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(x[:, i : i + size : 2, j : j + size : 2] @ kernel[i, j] for i in range(3) for j in range(3))


def test_sincos2d_layout():
    table = vit.sincos2d((14, 14), 768)
    np.testing.assert_allclose((table**2).sum(1), np.full(196, 384), rtol=1e-5)
    np.testing.assert_allclose(table[1, 0], np.sin(1), rtol=1e-6)  # column 1
    assert table[14, 0] == 0  # row 1, column 0
    np.testing.assert_allclose(table[14, 384], np.sin(1), rtol=1e-6)
    np.testing.assert_allclose(table[14, 385], np.sin(10000 ** (-1 / 192)), rtol=1e-5)
    module = build_encoder({"name": "vit", "position": "sincos2d", "variant": "mu/8"})
    params, _ = abstract_variables(module, 1, 32, 32, 3)
    assert "pos_embed" not in params


@pytest.mark.full
def test_vit_initializers():
    _, params, _ = small_vit()
    for kernel, bound in (
        (params["block0"]["attention"]["qkv"]["kernel"], np.sqrt(6 / (32 + 32))),
        (params["block0"]["mlp"]["fc1"]["kernel"], np.sqrt(6 / (32 + 128))),
        (params["patch_embed"]["kernel"], np.sqrt(6 / (192 + 32))),
    ):
        assert 0.99 * bound < float(jnp.abs(kernel).max()) <= bound


@pytest.mark.full
def test_vit_remat_keeps_gradients():
    _, params, x = small_vit()
    grads = []
    for remat in ("none", "dots", "full"):
        module = build_encoder({"name": "vit", "variant": "mu/8", "remat": remat})

        def loss(params, module=module):
            return jnp.sum(common.apply(module, params, {}, x, True)[0]["pooled"] ** 3)

        grads.append(jax.jit(jax.grad(loss))(params))
    for other in grads[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads[0], other)


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def test_activations_are_sharded_over_the_batch_axes(mesh):
    module, params, x = small_vit()
    run = jax.jit(lambda params, x: common.apply(module, params, {}, x, False)[0])
    alone = run(params, x)
    with jax.set_mesh(mesh):
        text = run.lower(params, x).as_text()
        batch = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
        together = run(jax.device_put(params, NamedSharding(mesh, PartitionSpec())), batch)
        assert common.shard_batch(x) is x  # nothing is traced
        assert run(params, x[:3])["pooled"].shape == (3, 32)  # four does not divide three
    assert len(re.findall(r"sharding_constraint", text)) == 2  # embedded tokens, one block
    np.testing.assert_allclose(together["pooled"], alone["pooled"], atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "resnt"}, "encoder.name has no 'resnt'; did you mean 'resnet' or 'revnet'. valid: resnet, resnet_v2, revnet"),
        ({"depth": 18}, "encoder.name has no None; valid: resnet"),
        ({"name": "resnet", "dept": 18}, "has no 'dept'; did you mean 'depth'. valid: depth, width, stem"),
        ({"name": "vit", "depth": 18}, "has no 'depth'; .*valid: variant, pool"),
        ({"name": "resnet", "depth": 19}, "no depth 19; choose one of 10, 18, 34"),
        ({"name": "resnet", "stem": "small"}, "no stem 'small'; choose one of imagenet, cifar"),
        ({"name": "resnet", "width": 0.3}, "width 0.3 gives 19.2 channels"),
        ({"name": "resnet", "depth": 18, "sk": True}, "sk=True needs depth >= 50"),
        ({"name": "vit", "variant": "X/16"}, "no variant 'X/16'; write SIZE/PATCH"),
        ({"name": "vit", "pool": "max"}, "no pool 'max'; choose one of cls, gap"),
        ({"name": "vit", "registers": -1}, "registers -1 is negative"),
        ({"name": "mlp", "widths": ()}, "give one or more positive widths"),
    ],
)
def test_invalid_encoder_config_raises_one_line_user_error(spec, message):
    with pytest.raises(UserError, match=message) as error:
        build_encoder(spec)
    assert "\n" not in str(error.value)


def test_vit_refuses_images_that_patches_do_not_tile():
    with pytest.raises(UserError, match="cannot tile 30x30 images; use multiples of 8"):
        abstract_variables(build_encoder({"name": "vit", "variant": "mu/8"}), 1, 30, 30, 3)
