"""The non-linear and convolutional probes against PyTorch's steps and on data that no linear classifier separates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eval_contexts import make_context
from feature_clouds import mesh_of
from torch_reference import require_torch

from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.evals.kinds import convolutional, linear, nonlinear
from ssl_jax.evals.lib import network_probe
from ssl_jax.evals.lib.features import Features
from ssl_jax.models.common import create
from ssl_jax.models.heads import ConvolutionalHead, ProjectionHead


def parity(values, count):
    """Images whose class is the parity of two bright halves: no linear function of pixels tells it."""
    bits = np.random.default_rng(values).integers(0, 2, (count, 2))
    x = np.random.default_rng(values + 1).integers(0, 60, (count, 6, 6, 1))
    x[:, :3] += 160 * bits[:, :1, None, None]
    x[:, 3:] += 160 * bits[:, 1:, None, None]
    return x.astype(np.uint8), bits.sum(1) % 2


@jax.jit
def encode(images):
    x = images / 255.0
    return {"pooled": x.reshape(len(x), -1), "layer2": x}


@pytest.mark.parametrize("kind", ["nonlinear", "convolutional"])
@pytest.mark.full
def test_steps_equal_those_of_pytorch(kind):
    torch = require_torch()
    nn, generator = torch.nn, np.random.default_rng(0)
    training = network_probe.Training(
        epochs=4, batch_size=8, learning_rate=0.1, weight_decay=0.01, seed=3, milestones=(0.5,)
    )
    if kind == "nonlinear":
        shape, ours = (6,), ProjectionHead((5, 5, 3), last_batch_norm=False, last_bias=True)
        net = nn.Sequential(
            nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(),
            nn.Linear(5, 3),
        )  # fmt: skip
        layers = {"linear1": net[0], "bn1": net[1], "linear2": net[3], "bn2": net[4], "linear3": net[6]}
    else:
        shape, ours = (4, 3, 2), ConvolutionalHead(3, 5)
        net = nn.Sequential(
            nn.Conv2d(2, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
            nn.Conv2d(5, 5, 1, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
            nn.Conv2d(5, 5, 1, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
        )  # fmt: skip
        layers = {f"conv{i}": net[3 * i - 3] for i in (1, 2, 3)} | {f"conv{i}_bn": net[3 * i - 2] for i in (1, 2, 3)}
        layers["linear"] = net[-1]

    def parts(layer):  # (our name, PyTorch's parameter, axes of PyTorch's array in our order)
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            return [("scale", layer.weight, (0,)), ("bias", layer.bias, (0,))]
        axes = (1, 0) if layer.weight.ndim == 2 else (2, 3, 1, 0)
        return [("kernel", layer.weight, axes)] + ([] if layer.bias is None else [("bias", layer.bias, (0,))])

    x = generator.standard_normal((19, *shape)).astype(np.float32)
    y = generator.integers(0, 3, 19).astype(np.int32)
    params, _ = jax.jit(lambda x: create(ours, jax.random.key(3), x))(x[:2])
    with torch.no_grad():
        for name, layer in layers.items():
            for leaf, value, axes in parts(layer):
                value.copy_(torch.from_numpy(np.array(params[name][leaf]).transpose(np.argsort(axes))))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    shuffle, done = np.random.default_rng([3, 1]), 0
    for _ in range(4):
        for rows in np.resize(shuffle.permutation(19), (3, 8)):
            optimizer.param_groups[0]["lr"] = 0.1 * (0.2 if done >= 6 else 1)
            images = torch.from_numpy(x[rows] if x.ndim == 2 else x[rows].transpose(0, 3, 1, 2).copy())
            loss = torch.nn.functional.cross_entropy(net(images), torch.from_numpy(y[rows]).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
    trained, _ = network_probe.train(ours, Features(x.reshape(19, -1), y), shape, training, mesh_of(1))
    for name, layer in layers.items():
        for leaf, value, axes in parts(layer):
            np.testing.assert_allclose(
                trained[name][leaf], value.detach().numpy().transpose(axes), atol=2e-4, err_msg=f"{name} {leaf}"
            )
            assert np.abs(np.asarray(trained[name][leaf]) - np.asarray(params[name][leaf])).max() > 1e-3


@pytest.mark.full
def test_probes_learn_what_a_linear_one_cannot():
    (train, y_train), (test, y_test) = parity(0, 256), parity(2, 128)
    given = make_context(train, test, encode, {"train": y_train, "test": y_test}, size=64)
    assert linear.evaluate(given, solver="ridge").metrics["top1"] < 75
    options = dict(epochs=8, batch_size=32)
    for kind, layer in ((nonlinear, "pooled"), (convolutional, "layer2")):
        result = kind.evaluate(given, layer=layer, **options)
        assert result.metrics["top1"] > 95
        assert "\n" not in result.protocol
        assert f"x 0.2 at {', '.join(map(str, kind.MILESTONES))} of epochs=8 batch=32 wd=0.0005" in result.protocol
        assert f"layer={layer} train=train(256) test=test(128)" in result.protocol


@pytest.mark.full
def test_results_do_not_depend_on_the_number_of_devices():
    (train, y_train), (test, _) = parity(0, 64), parity(2, 40)
    logits = []
    for devices in (1, 8):
        network, shape = ConvolutionalHead(2, 4), (6, 6, 1)
        training = network_probe.Training(2, 16, 0.1, 5e-4, 0, (0.5,))
        mesh = mesh_of(devices)
        x, z = (np.float32(images.reshape(len(images), -1) / 255) for images in (train, test))
        variables = network_probe.train(network, Features(x, y_train.astype(np.int32)), shape, training, mesh)
        logits.append(network_probe.predict(network, variables, z, shape, mesh))
    assert logits[0].shape == (40, 2)
    np.testing.assert_allclose(*logits, atol=1e-4)


def test_network_probes_refuse_bad_input():
    given = make_context(*(parity(i, 16)[0] for i in (0, 2)), encode)
    with pytest.raises(UserError, match="convolutional reads maps, and 'pooled' is none; maps of the encoder: layer2"):
        evals.check_needs({"one": dict(kind="convolutional", layer="pooled")}, given)
    with pytest.raises(UserError, match=r"evals\.one.layer='layer3' does not exist"):
        evals.check_needs({"one": dict(kind="nonlinear", layer="layer3")}, given)
    with pytest.raises(UserError, match=r"nonlinear probe.* needs labels"):
        nonlinear.evaluate(given)
    for kind, option in (
        ("nonlinear", dict(epochs=0)),
        ("convolutional", dict(channels=0)),
        ("nonlinear", dict(learning_rate=0.0)),
    ):
        with pytest.raises(UserError, match="must be"):
            evals.check({"one": dict(kind=kind, **option)})


@pytest.mark.full
def test_convolutional_head_takes_the_mean_over_space():
    head = ConvolutionalHead(3, 4)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, 1, 5)), jnp.float32)
    params, _ = create(head, jax.random.key(0), x)
    sizes = {name: {leaf: value.shape for leaf, value in leaves.items()} for name, leaves in params.items()}
    assert sizes["conv1"] == {"kernel": (3, 3, 5, 4)} and sizes["linear"] == {"kernel": (4, 3), "bias": (3,)}
