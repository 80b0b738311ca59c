"""ViT blocks: scanned or unrolled, sharded over 'tensor' and 'fsdp' or not, they compute the same."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ssl_jax.engine.sharding import leaf_names, make_mesh, spec_of
from ssl_jax.models import common
from ssl_jax.models.backbones import vit
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.pretrained.torch_layout import from_torch, to_torch


def build_vit(x, **fields):
    """(module, its parameters)"""
    module = build_encoder({"name": "vit", "variant": "mu/8", **fields})
    return module, jax.jit(functools.partial(common.init_variables, module))(jax.random.key(1), x)[0]


def images(batch, size):
    return jax.random.uniform(jax.random.key(0), (batch, size, size, 3))


@pytest.mark.full
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_scanned_blocks_equal_unrolled_blocks(remat, monkeypatch):
    """Equal features, gradients and names as unrolled blocks, and one loop body in the program."""
    monkeypatch.setitem(vit.SIZES, "three", vit.Size(32, 3, 2, 128))
    x = images(2, 16)
    looped, stacked = build_vit(x, variant="three/8", remat=remat, scan=True)
    single, alone = build_vit(x, variant="three/8", remat=remat)
    params = vit.unstack(stacked)
    assert set(leaf_names(params)) == set(leaf_names(alone))
    jax.tree.map(np.testing.assert_array_equal, vit.stack(params), stacked)
    assert not np.array_equal(*(params[f"block{i}"]["mlp"]["fc1"]["kernel"] for i in (0, 1)))  # each has its own key
    expected, found = (common.apply(m, p, {}, x, False)[0] for m, p in ((single, params), (looped, stacked)))
    assert set(found) == set(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)

    def loss(module):
        return lambda params: jnp.sum(common.apply(module, params, {}, x, True)[0]["pooled"] ** 3)

    found, expected = jax.jit(jax.grad(loss(looped)))(stacked), jax.jit(jax.grad(loss(single)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), vit.unstack(found), expected)
    assert jax.jit(loss(looped)).lower(stacked).as_text().count("stablehlo.while") == 1


@pytest.mark.full
def test_scanned_vit_exports_to_separate_pytorch_blocks():
    x = images(1, 16)
    _, stacked = build_vit(x, scan=True)
    spec = {"name": "vit", "variant": "mu/8"}
    state = to_torch({**spec, "scan": True}, stacked, {})
    jax.tree.map(np.testing.assert_array_equal, state, to_torch(spec, vit.unstack(stacked), {}))
    jax.tree.map(np.testing.assert_array_equal, from_torch({**spec, "scan": True}, state)[0], stacked)


@pytest.mark.parametrize(("data", "fsdp", "scan"), [(4, 1, False), (2, 2, False), (2, 2, True)])
@pytest.mark.full
def test_tensor_sharding_rules_match_and_keep_outputs(data, fsdp, scan):
    mesh = make_mesh({"data": data, "fsdp": fsdp, "tensor": 2}, jax.devices()[:8])
    x = images(8, 16)
    module, params = build_vit(x, scan=scan)
    run = jax.jit(lambda params, x: common.apply(module, params, {}, x, False)[0]["pooled"])
    matched = set()

    def shard(path, leaf):
        path = "/".join(key.key for key in path)
        for pattern, axes in vit.TENSOR_RULES:
            if re.search(pattern, path):
                matched.add(pattern)
                assert len(axes) + scan == leaf.ndim
                return jax.device_put(leaf, NamedSharding(mesh, spec_of(axes, leaf.shape, mesh, path)))
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec()))

    sharded = jax.tree_util.tree_map_with_path(shard, params)
    assert matched == {pattern for pattern, _ in vit.TENSOR_RULES}
    with jax.set_mesh(mesh):
        batch = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
        hlo = run.lower(sharded, batch).compile().as_text()
        np.testing.assert_allclose(run(sharded, batch), run(params, x), atol=1e-5)
    collectives = re.findall(r"(all-reduce|all-gather|all-to-all|collective-permute)\(", hlo)
    assert collectives.count("all-reduce") == 2  # after proj and after fc2, as in Megatron
    assert collectives.count("all-gather") == (0 if fsdp == 1 else 4)  # of the matrices
    assert len(collectives) == (2 if fsdp == 1 else 6)  # none of the activations
