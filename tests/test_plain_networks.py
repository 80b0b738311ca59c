"""Plain networks, ResNet-v2, CPC and hypercolumns against torchvision, timm, PyTorch, loops and published counts."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import require_timm, require_torch, require_torchvision

from ssl_jax.engine import sharding
from ssl_jax.engine.method import State
from ssl_jax.errors import UserError
from ssl_jax.models import hypercolumns
from ssl_jax.models.backbones import resnet_v2
from ssl_jax.models.backbones.alexnet import local_response_norm
from ssl_jax.models.backbones.encoders import ENCODERS, build_encoder
from ssl_jax.models.common import create, flatten_dict, run, unflatten_dict
from ssl_jax.models.cpc import ContextNet

SMALL = {  # forms for two CPU cores, and the size of their images
    "alexnet": (dict(width=0.25, conv1=(5, 1, 2)), 32),
    "nin": (dict(width=0.25), 32),
    "vgg": (dict(width=0.125), 32),
    "resnet_v2": (dict(depth=10, width=0.25, stem="cifar"), 32),
}
CPC_SMALL = dict(depth=10, width=0.25, stem="cifar", groups=3, last_norm=False)
V1 = dict(depth=101, groups=3, norm="none", last_norm=False)
V2 = dict(depth=161, norm="layer", last_norm=False)


def images(batch, size, channels=3, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, size, size, channels)).astype(np.float32)


def shapes(spec, size, channels=3, batch=2):
    """(outputs, parameters, state) as shapes."""
    module = build_encoder(spec)
    x = jax.ShapeDtypeStruct((batch, size, size, channels), jnp.float32)
    params, state = jax.eval_shape(lambda x: create(module, jax.random.key(0), x), x)
    return jax.eval_shape(lambda p, s, x: run(module, p, s, x, train=False)[0], params, state, x), params, state


def sides(out):
    return {name: x.shape[1] for name, x in out.items() if x.ndim == 4}


def count(params, leaf=""):
    return sum(x.size for path, x in flatten_dict(params, sep="/").items() if path.endswith(leaf))


def random_weights(module, seed=0):
    """Fill a PyTorch module with random weights, scales, offsets and statistics."""
    torch = require_torch()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                noise = torch.randn(value.shape, generator=generator)
                fan = np.prod(value.shape[1:]) if value.ndim > 1 else 25
                value.copy_(noise / np.sqrt(fan))
                if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
                    value.copy_(1 + 0.2 * noise.clamp(-3, 3))
    return module.eval()


def from_torch(layers):
    """Variables of [(our name, PyTorch convolution or linear layer, its BatchNorm or None)]; a bias before BatchNorm moves into it."""
    params, stats = {}, {}
    for name, layer, norm in layers:
        kernel = layer.weight.detach().numpy()
        params[f"{name}/kernel"] = kernel.transpose((2, 3, 1, 0) if kernel.ndim == 4 else (1, 0))
        bias = 0 if layer.bias is None else layer.bias.detach().numpy()
        if norm is None:
            if layer.bias is not None:
                params[f"{name}/bias"] = bias
            continue
        params |= {f"{name}_bn/scale": norm.weight.detach().numpy(), f"{name}_bn/bias": norm.bias.detach().numpy()}
        stats |= {f"{name}_bn/mean": norm.running_mean.numpy() - bias, f"{name}_bn/var": norm.running_var.numpy()}
    return unflatten_dict(params, sep="/"), {"batch_stats": unflatten_dict(stats, sep="/")} if stats else {}


def ours(spec, variables, x):
    _, params, state = shapes(spec, x.shape[1], x.shape[-1], len(x))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, (params, state))
    module = build_encoder(spec)
    return jax.jit(lambda p, s, x: run(module, p, s, x, train=False)[0])(*variables, x)


def theirs(module, x):
    """{index: output [B, h, w, C]} of the layers of a PyTorch Sequential."""
    torch, out = require_torch(), {}
    y = torch.from_numpy(x.transpose(0, 3, 1, 2)).contiguous()
    with torch.no_grad():
        for index, layer in enumerate(module):
            y = layer(y)
            out[index] = y.numpy().transpose(0, 2, 3, 1).copy() if y.ndim == 4 else y.numpy().copy()
    return out


def assert_close(actual, expected, rtol=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())


# --- AlexNet


@pytest.mark.full
def test_alexnet_equals_torchvision():
    torchvision = require_torchvision()
    net = random_weights(torchvision.models.alexnet(weights=None, num_classes=2).features)
    places = {"conv1": 0, "conv2": 3, "conv3": 6, "conv4": 8, "conv5": 10}
    variables = from_torch([(name, net[i], None) for name, i in places.items()])
    x = images(1, 95)
    out, expected = ours({"name": "alexnet", "norm": "none"}, variables, x), theirs(net, x)
    for name, i in {**places, "pool5": 11}.items():
        assert_close(out[name], expected[i + 1])
    assert_close(out["pooled"], expected[12].mean((1, 2)))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_grouped_alexnet_equals_the_same_layers_in_pytorch(batch_norm):
    """Two towers of half the width: Caffe's order of pool and normalization, jigsaw's stride, and fully connected layers."""
    torch = require_torch()
    nn = torch.nn
    net, layers, channels = [], [], 3
    for index, (features, kernel, groups) in enumerate(((24, 11, 1), (64, 5, 2), (96, 3, 1), (96, 3, 2), (64, 3, 2)), 1):
        first = index == 1
        conv = nn.Conv2d(channels, features, kernel, 2 if first else 1, 0 if first else kernel // 2, groups=groups, bias=not batch_norm)
        norm = nn.BatchNorm2d(features) if batch_norm else None
        net += [conv, *([norm] if batch_norm else []), nn.ReLU()]
        net += [nn.MaxPool2d(3, 2)] * (index in (1, 2, 5)) + [nn.LocalResponseNorm(5)] * (index < 3 and not batch_norm)
        layers.append((f"conv{index}", conv, norm))
        channels = features
    fc, norm = nn.Linear(2 * 2 * 64, 10, bias=not batch_norm), nn.BatchNorm1d(10) if batch_norm else None
    ordered = nn.Unflatten(1, (64, 2, 2)), channels_last(), nn.Flatten()  # our rows are in the order of memory
    net = nn.Sequential(*net, nn.Flatten(), *ordered, fc, *([norm] if batch_norm else []), nn.ReLU())
    random_weights(net)
    x = images(3, 64) * 4
    spec = dict(
        name="alexnet", form="two_towers", width=0.25, groups=2, conv1=(11, 2, 0), fc=(10,), norm="batch" if batch_norm else "lrn"
    )
    expected = theirs(net, x)
    out = ours(spec, from_torch([*layers, ("fc6", fc, norm)]), x)
    assert_close(out["fc6"], expected[len(net) - 1])
    np.testing.assert_array_equal(out["pooled"], out["fc6"])
    assert out["conv1"].shape[1] == 27 and out["conv5"].shape[1] == 6


def channels_last():
    torch = require_torch()

    class ChannelsLast(torch.nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1)

    return ChannelsLast()


def test_local_response_norm_against_a_float64_loop():
    x = 30 * images(2, 3, 7)
    expected = np.zeros(x.shape)
    for c in range(7):
        neighbors = x[..., max(0, c - 2) : c + 3].astype(np.float64)
        expected[..., c] = x[..., c] / (1 + 1e-4 * np.square(neighbors).sum(-1) / 5) ** 0.75
    np.testing.assert_allclose(local_response_norm(jnp.asarray(x)), expected, rtol=1e-5)
    assert np.abs(expected / x).min() < 0.97


@pytest.mark.parametrize(
    ("fields", "size", "expected"),
    [
        (dict(norm="none"), 224, 2_469_696),  # torchvision's features
        (dict(norm="none", fc=(4096, 4096)), 224, 61_100_840 - 1000 * 4097),  # torchvision without the classifier
        (dict(form="two_towers", norm="lrn", groups=2, conv1=(11, 4, 0), fc=(4096, 4096)), 227, 60_965_224 - 1000 * 4097),  # Caffe's
        (dict(fc=(4096, 4096)), 224, 61_100_840 - 1000 * 4097 - 9344 + 2 * 9344),  # RotNet's: BatchNorm replaces biases
    ],
)
def test_alexnet_parameter_counts(fields, size, expected):
    out, params, _ = shapes({"name": "alexnet", **fields}, size)
    assert count(params) == expected
    assert list(sides(out).values()) == [55, 27, 13, 13, 13, 6]


def test_parameters_of_an_alexnet_on_tiles_fit_whole_images():
    _, tiles, _ = shapes({"name": "alexnet", "conv1": (11, 2, 0)}, 64)
    out, whole, _ = shapes({"name": "alexnet", "conv1": (11, 4, 0)}, 227)
    assert jax.tree.map(jnp.shape, tiles) == jax.tree.map(jnp.shape, whole)
    assert out["conv5"].shape[1] == 13


# --- Network in Network


@pytest.mark.parametrize("blocks", [3, 5])
def test_nin_equals_the_same_layers_in_pytorch(blocks):
    torch = require_torch()
    nn, width = torch.nn, 0.125
    net, layers, channels, ends = [], [], 3, []
    for block in range(1, blocks + 1):
        for index, features in enumerate((192, 160, 96) if block == 1 else (192, 192, 192), 1):
            kernel = 1 if index > 1 else 5 if block < 3 else 3
            features = round(features * width)
            conv, norm = nn.Conv2d(channels, features, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(features)
            net += [conv, norm, nn.ReLU()]
            layers.append((f"block{block}_conv{index}", conv, norm))
            channels = features
        net += [nn.MaxPool2d(3, 2, 1)] * (block == 1) + [nn.AvgPool2d(3, 2, 1)] * (block == 2)
        ends.append(len(net) - 1)
    net = random_weights(nn.Sequential(*net))
    x = images(2, 32)
    out = ours({"name": "nin", "blocks": blocks, "width": width}, from_torch(layers), x)
    expected = theirs(net, x)
    for block, end in enumerate(ends, 1):
        assert_close(out[f"block{block}"], expected[end])
    assert_close(out["pooled"], expected[ends[-1]].mean((1, 2)))
    assert set(out) == {*(f"block{i}" for i in range(1, blocks + 1)), "pooled"}


def test_nin_has_the_published_shapes():
    out, params, _ = shapes({"name": "nin"}, 32)
    assert {name: x.shape[1:] for name, x in out.items()} == {
        "block1": (16, 16, 96), "block2": (8, 8, 192), "block3": (8, 8, 192), "block4": (8, 8, 192), "pooled": (192,),
    }  # fmt: skip
    assert out["block2"].shape[1:] == (8, 8, 192) and 8 * 8 * 192 == 12_288  # inputs of RotNet's non-linear classifier
    kernels = 25 * 3 * 192 + 192 * 160 + 160 * 96 + 25 * 96 * 192 + 2 * 192**2 + 2 * (9 + 2) * 192**2
    assert count(params) == kernels + 2 * (192 + 160 + 96 + 9 * 192)


# --- VGG-16


@pytest.mark.parametrize("batch_norm", [False, True])
def test_vgg_equals_torchvision(batch_norm):
    torchvision = require_torchvision()
    widths = [c if c == "M" else c // 8 for c in torchvision.models.vgg.cfgs["D"]]
    net = random_weights(torchvision.models.vgg.make_layers(widths, batch_norm=batch_norm))
    layers, ends, group, index = [], {}, 1, 0
    for i, layer in enumerate(net):
        kind = type(layer).__name__
        if kind == "Conv2d":
            index += 1
            layers.append((f"conv{group}_{index}", layer, net[i + 1] if batch_norm else None))
        elif kind == "ReLU":
            ends[f"conv{group}_{index}"] = i
        elif kind == "MaxPool2d":
            group, index = group + 1, 0
    x = images(2, 64)
    out = ours({"name": "vgg", "width": 0.125, "batch_norm": batch_norm}, from_torch(layers), x)
    expected = theirs(net, x)
    assert len(ends) == 13 and set(out) == {*ends, "pool5", "pooled"}
    for name, i in ends.items():
        assert_close(out[name], expected[i])
    assert_close(out["pool5"], expected[len(net) - 1])
    assert_close(out["pooled"], expected[len(net) - 1].mean((1, 2)))


def test_vgg_parameter_counts_and_sizes():
    _, params, _ = shapes({"name": "vgg", "batch_norm": False}, 32)
    assert count(params) == 14_714_688  # torchvision's features
    out, params, _ = shapes({"name": "vgg", "fc": 4096}, 224)
    assert count(params) == 14_714_688 + 4_224 + 49 * 512 * 4096 + 4096**2 + 4 * 4096  # scales beside offsets; two more layers
    assert [out[f"conv{g}_1"].shape[1] for g in range(1, 6)] == [224, 112, 56, 28, 14]
    assert out["fc7"].shape[1:] == (7, 7, 4096) and out["pooled"].shape == (2, 4096)


@pytest.mark.full
def test_center_of_fc6_is_the_fully_connected_layer_of_7x7():
    module = build_encoder({"name": "vgg", "width": 1 / 32, "fc": 5, "batch_norm": False})
    x = jnp.asarray(images(1, 224))
    params, state = create(module, jax.random.key(0), x)
    out, _ = jax.jit(lambda p, x: run(module, p, state, x, train=False))(params, x)
    whole = np.einsum("hwc,hwcf->f", *(np.asarray(a, np.float64) for a in (out["pool5"][0], params["fc6"]["kernel"])))
    np.testing.assert_allclose(out["fc6"][0, 3, 3], np.maximum(whole, 0), rtol=1e-4, atol=1e-6)


# --- hypercolumns


def test_hypercolumns_at_points_against_a_float64_loop():
    maps = [jnp.asarray(images(2, side, channels, seed=side)) for side, channels in ((8, 3), (4, 2), (1, 5))]
    points = np.random.default_rng(1).random((2, 12, 2)).astype(np.float32)
    points[:, :4] = [(0, 0), (1, 1), (0, 1), (0.5, 0.5)]
    found = jax.jit(hypercolumns.at_points)(maps, jnp.asarray(points))
    expected = np.zeros((2, 12, 10))
    for b in range(2):
        for n in range(12):
            column = []
            for x in maps:
                side = x.shape[1]
                value = np.zeros(x.shape[-1])
                for i in range(side):
                    for j in range(side):
                        row, right = (np.clip(float(points[b, n, k]) * side - 0.5, 0, side - 1) for k in (0, 1))
                        value += max(0, 1 - abs(row - i)) * max(0, 1 - abs(right - j)) * np.asarray(x[b, i, j], np.float64)
                column.append(value)
            expected[b, n] = np.concatenate(column)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (5, 3), (16, 16)])
def test_hypercolumns_on_a_grid_equal_those_at_its_pixel_centers(size):
    maps = [jnp.asarray(images(2, side, 2, seed=side)) for side in (16, 4, 1)]
    rows, columns = np.meshgrid(*((np.arange(n) + 0.5) / n for n in size), indexing="ij")
    points = np.broadcast_to(np.stack([rows, columns], -1).reshape(1, -1, 2), (2, size[0] * size[1], 2))
    expected = jax.jit(hypercolumns.at_points)(maps, jnp.asarray(points, jnp.float32)).reshape(2, *size, -1)
    np.testing.assert_allclose(jax.jit(hypercolumns.on_grid, static_argnums=1)(maps, size), expected, atol=1e-5)


# --- ResNet-v2 and CPC


@pytest.mark.parametrize("depth", [10, 50])
@pytest.mark.full
def test_resnet_v2_equals_timm(monkeypatch, depth):
    require_timm()
    from timm.layers import BatchNormAct2d, create_conv2d
    from timm.models import resnetv2 as timm_v2

    monkeypatch.setitem(resnet_v2.DEPTHS, depth, (2, 1, 2, 1))
    bottleneck, width = depth == 50, 0.25
    channels = [round(width * 64 * 2**i * (4 if bottleneck else 1)) for i in range(4)]
    net = timm_v2.ResNetV2(
        layers=[2, 1, 2, 1], channels=channels, num_classes=0, stem_chs=16, preact=True, basic=not bottleneck,
        bottle_ratio=0.25 if bottleneck else 1.0, norm_layer=BatchNormAct2d, conv_layer=create_conv2d,
    )  # fmt: skip
    random_weights(net)
    state = {name: value.numpy() for name, value in net.state_dict().items()}
    params, stats = {}, {}
    for name, value in state.items():
        module, leaf = name.rsplit(".", 1)
        module = module.replace("stem.conv", "stem_conv").replace(".downsample.conv", "/shortcut_conv")
        module = module.replace("stages.", "layer").replace(".blocks.", "_").replace(".", "/")
        if module.startswith("layer"):
            module = f"layer{int(module[5]) + 1}{module[6:]}"
        if value.ndim == 4:
            params[f"{module}/kernel"] = value.transpose(2, 3, 1, 0)
        elif leaf.startswith("running"):
            stats[f"{module}/{leaf.removeprefix('running_')}"] = value
        elif leaf in ("weight", "bias"):
            params[f"{module}/{'scale' if leaf == 'weight' else leaf}"] = value
    variables = unflatten_dict(params, sep="/"), {"batch_stats": unflatten_dict(stats, sep="/")}
    x = images(2, 65)
    out = ours({"name": "resnet_v2", "depth": depth, "width": width}, variables, x)
    torch = require_torch()
    with torch.no_grad():
        y, expected = net.stem(torch.from_numpy(x.transpose(0, 3, 1, 2)).contiguous()), {}
        for i, stage in enumerate(net.stages, 1):
            y = stage(y)
            expected[f"layer{i}"] = y
        expected["last"] = net.norm(y)
    for name, value in expected.items():
        assert_close(out[name], value.numpy().transpose(0, 2, 3, 1))
    assert_close(out["pooled"], expected["last"].numpy().mean((2, 3)))


@pytest.mark.full
def test_resnet_v2_50_has_the_parameters_of_timm():
    require_timm()
    import timm

    torch = require_torch()
    with torch.device("meta"):
        expected = sum(x.numel() for x in timm.create_model("resnetv2_50", num_classes=0).parameters())
    assert count(shapes({"name": "resnet_v2", "depth": 50}, 32)[1]) == expected


@pytest.mark.full
@pytest.mark.parametrize(("fields", "size", "millions", "dim"), [(V1, 64, 27.45, 1024), (V2, 80, 303.16, 4096)])
def test_cpc_encoders_have_the_published_weights(fields, size, millions, dim):
    out, params, state = shapes({"name": "resnet_v2", **fields}, size)
    assert count(params, "kernel") / 1e6 == pytest.approx(millions, abs=0.005)
    assert out["pooled"].shape == (2, dim) and out["layer3"].shape[1] == size // 16
    assert state == {}
    if fields is V2:  # the name counts convolutions, without those of shortcuts
        assert sum("shortcut" not in path and path.endswith("kernel") for path in flatten_dict(params, sep="/")) == 160
        assert [n for n in flatten_dict(params, sep="/") if n.endswith("conv1/bias")] == []


@pytest.mark.full
@pytest.mark.parametrize(("norm", "couples"), [("batch", True), ("layer", False), ("none", False)])
def test_patches_are_independent_except_with_batch_statistics(norm, couples):
    """CPC solves its task with batch statistics: they tell a patch about the others."""
    module = build_encoder({"name": "resnet_v2", **CPC_SMALL, "norm": norm})
    x = jnp.asarray(images(3, 8))
    params, state = create(module, jax.random.key(0), x)
    params = jax.tree.map(lambda p: p + 0.05, params)

    def first(x):
        return jnp.sum(jnp.square(run(module, params, state, x, train=True)[0]["pooled"][0]))

    gradient = jax.jit(jax.grad(first))(x)
    assert float(jnp.abs(gradient[0]).max()) > 0
    assert (float(jnp.abs(gradient[1:]).max()) > 0) == couples


@pytest.mark.full
def test_layer_normalization_is_over_space_and_channels():
    module = build_encoder({"name": "resnet_v2", **CPC_SMALL, "groups": 1, "norm": "layer", "last_norm": True})
    x = jnp.asarray(images(2, 8))
    params, state = create(module, jax.random.key(0), x)
    assert params["norm"]["scale"].shape == (16,) and state == {}
    out, _ = jax.jit(lambda p, x: run(module, p, state, x, train=True))(params, x)
    wide = np.asarray(out["layer1"], np.float64)
    mean, variance = wide.mean((1, 2, 3), keepdims=True), wide.var((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(out["last"], np.maximum((wide - mean) / np.sqrt(variance + 1e-5), 0), atol=1e-5)


def test_blocks_without_normalization_start_as_the_identity():
    module = build_encoder({"name": "resnet_v2", **CPC_SMALL, "norm": "none"})
    x = jnp.asarray(images(2, 8))
    params, state = create(module, jax.random.key(0), x)
    out, _ = run(module, params, state, x, train=True)
    np.testing.assert_array_equal(out["layer1"], out["stem"])
    assert set(params["layer1_0"]["conv1"]) == {"kernel", "bias"}
    np.testing.assert_allclose(out["pooled"], out["layer3"].mean((1, 2)), rtol=1e-6)


def test_context_network_of_cpc_has_the_published_parameters():
    params, state = jax.eval_shape(lambda x: create(ContextNet(), jax.random.key(0), x), jnp.zeros((1, 6, 6, 4096)))
    assert count(params) == 12_148_480 and state == {}
    with pytest.raises(UserError, match="blocks=0 is empty"):
        ContextNet(blocks=0)


@pytest.mark.full
def test_contexts_depend_on_their_row_and_five_above():
    module, z = ContextNet(8), jnp.asarray(images(1, 14, 4))
    params, _ = create(module, jax.random.key(0), z)
    row, column = 9, 6

    def context(z):
        return jnp.sum(run(module, params, {}, z, train=True)[0][0, row, column])

    seen = np.abs(jax.jit(jax.grad(context))(z)[0]).max(-1) > 0
    expected = np.zeros((14, 14), bool)
    expected[row - 5 : row + 1, column - 5 : column + 6] = True
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.full
def test_remat_of_resnet_v2_keeps_gradients():
    x, grads = jnp.asarray(images(4, 16)), []
    for remat in (False, True):
        module = build_encoder({"name": "resnet_v2", **SMALL["resnet_v2"][0], "remat": remat})
        params, state = create(module, jax.random.key(0), x)

        def loss(params, module=module, state=state):
            return jnp.sum(run(module, params, state, x, train=True)[0]["pooled"] ** 3)

        assert remat == ("remat" in str(jax.make_jaxpr(loss)(params)))
        grads.append(jax.jit(jax.grad(loss))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max()), *grads)


# --- all of them


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("name", SMALL)
def test_small_forms_read_any_channels_and_are_sharded_by_the_default_rule(name, channels):
    """Split-brain reads one or two channels. Types, shapes and shardings, without computing."""
    fields, size = SMALL[name]
    for dtype in (jnp.float32, jnp.bfloat16):
        module = build_encoder({"name": name, **fields}, dtype)
        x = jax.ShapeDtypeStruct((8, size, size, channels), jnp.float32)
        params, state = jax.eval_shape(functools.partial(create, module), jax.random.key(0), x)
        assert {leaf.dtype for leaf in jax.tree.leaves((params, state))} == {jnp.dtype("float32")}
        out, new = jax.eval_shape(functools.partial(run, module, train=True), params, state, x)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        assert out["pooled"].dtype == jnp.float32 and out["pooled"].ndim == 2
        assert {x.dtype for key, x in out.items() if key != "pooled"} == {jnp.dtype(dtype)}
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
    placed = sharding.shard_state(((".*", "fsdp"),), State(np.int32(0), {"net": params}, {}, state, {}), mesh)
    assert jax.tree.structure(placed.params["net"]) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(name="alexnet", form="caffe"), "alexnet has no form 'caffe'; choose one of one_tower, two_towers"),
        (dict(name="alexnet", norm="layer"), "alexnet has no norm 'layer'; choose one of batch, lrn, none"),
        (dict(name="alexnet", groups=3), "alexnet has no groups 3; choose one of 1, 2"),
        (dict(name="alexnet", width=0.3), "alexnet width 0.3 gives 19.2 channels"),
        (dict(name="alexnet", width=1 / 64, groups=2), "gives 1 channels, no positive multiple of 2"),
        (dict(name="alexnet", conv1=(11, 0, 2)), r"alexnet conv1=\(11, 0, 2\) is not \(kernel, stride, padding\)"),
        (dict(name="alexnet", fc=(0,)), "alexnet fc widths"),
        (dict(name="nin", blocks=2), "nin has no form with 2 blocks; choose 3 to 5"),
        (dict(name="nin", width=0), "nin width 0 gives 0 channels"),
        (dict(name="vgg", fc=-1), "vgg fc=-1 is negative"),
        (dict(name="vgg", width=0.01), "vgg width 0.01 gives 0.64 channels"),
        (dict(name="resnet_v2", depth=42), "resnet_v2 has no depth 42; choose one of 10, 18, .*161"),
        (dict(name="resnet_v2", norm="group"), "resnet_v2 has no norm 'group'"),
        (dict(name="resnet_v2", depth=161, groups=4), "resnet_v2 has no groups 4; choose one of 0, 1, 2, 3"),
        (dict(name="resnet_v2", stem="tiny"), "resnet_v2 has no stem 'tiny'"),
        (dict(name="resnet_v2", width=0.3), "resnet_v2 width 0.3 gives 19.2 channels"),
    ],
)
def test_invalid_fields_raise_one_line(spec, message):
    with pytest.raises(UserError, match=message) as error:
        build_encoder(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "size"), [("alexnet", 32), ("alexnet", 62), ("vgg", 31), ("nin", 1)])
def test_images_too_small_for_the_pools_raise_one_line(name, size):
    with pytest.raises(UserError, match=f"{name}.* shrinks images of {size}x{size} pixels .*; use larger images"):
        shapes({"name": name}, size)


def test_fully_connected_layers_refuse_another_image_size():
    module = build_encoder({"name": "alexnet", **SMALL["alexnet"][0], "fc": (8,)})
    params, state = jax.eval_shape(lambda x: create(module, jax.random.key(0), x), jnp.zeros((1, 32, 32, 3)))
    with pytest.raises(UserError, match=r"alexnet with fc=\(8,\) takes images of the size it was trained on, not \(64, 64\)"):
        jax.eval_shape(lambda p, s, x: run(module, p, s, x, train=False), params, state, jnp.zeros((1, 64, 64, 3)))


def test_the_page_of_the_encoders_has_all_of_them_and_valid_forms():
    """Each form in the two tables can be built."""
    page = (pathlib.Path(__file__).parent.parent / "docs" / "reference" / "encoders.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| .* \| `(.*)` \|$", page, re.MULTILINE)
    assert [name for name, _ in rows] == list(ENCODERS)
    small = [{"name": name, **eval(f"dict({fields})")} for name, fields in rows]
    published = [eval(found) for found in re.findall(r"`(dict\(name='.*?\))`", page)]
    assert len(published) == 8
    for spec in (*small, *published):
        build_encoder(spec)
