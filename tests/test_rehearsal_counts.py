"""FLOPs of traced programs and collectives of HLO texts, against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ssl_jax.engine import sharding
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.rehearsal.collectives import Collective, collectives
from ssl_jax.rehearsal.flops import Count, count
from ssl_jax.rehearsal.largest import largest
from ssl_jax.rehearsal.replicas import device_groups, mesh_axes


def flops(function, *shapes):
    return count(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)))


def conv(x, w, stride=1, padding="SAME", groups=1):
    return lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


MATMUL = 2 * 3 * 5 * 7  # of [3, 5] @ [5, 7]


def test_flops_of_matrix_products():
    assert flops(jnp.matmul, (3, 5), (5, 7)).flops == MATMUL
    assert flops(jnp.matmul, (4, 3, 5), (4, 5, 7)).flops == 4 * MATMUL
    assert flops(lambda x, y: jnp.sum(x) + jnp.sum(y), (3, 5), (5, 7)).flops == 0


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_flops_of_convolutions_and_their_gradients(stride, groups):
    x, w = (2, 8, 8, 12), (3, 3, 12 // groups, 16)
    forward = 2 * (2 * (8 // stride) ** 2 * 16) * (3 * 3 * 12 // groups)
    assert flops(lambda x, w: conv(x, w, stride, groups=groups), x, w).flops == forward
    loss = lambda x, w: jnp.sum(conv(x, w, stride, groups=groups) ** 2)  # noqa: E731
    assert flops(jax.grad(loss, 1), x, w).flops == 2 * forward
    assert flops(jax.grad(loss, (0, 1)), x, w).flops == 3 * forward


def test_flops_of_loops_branches_and_dead_code():
    step = lambda x, _: (x @ x, None)  # noqa: E731
    cube = 2 * 4**3
    assert flops(lambda x: lax.scan(step, x, None, length=11)[0], (4, 4)).flops == 11 * cube
    nested = lambda x, _: (lax.scan(step, x, None, length=3)[0], None)  # noqa: E731
    assert flops(lambda x: lax.scan(nested, x, None, length=5)[0], (4, 4)).flops == 15 * cube
    assert flops(lambda x: lax.fori_loop(0, 9, lambda _, x: x @ x, x), (4, 4)) == Count(9 * cube, wide=9 * cube)
    assert flops(lambda x: lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ x, x), (4, 4)) == Count(cube, endless=1, wide=cube)
    assert flops(lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x), (4, 4)).flops == 2 * cube
    assert flops(lambda x: (x @ x, x)[1], (4, 4)).flops == 0
    assert flops(jax.jit(lambda x: jax.vmap(lambda y: y @ x)(x)), (4, 4)).flops == 2 * 4 * 4 * 4


def test_flops_count_rematerialization():
    def loss(wrap):
        block = wrap(lambda x, w: jnp.sin(x @ w) @ w)
        return lambda x, w: jnp.sum(block(x, w) ** 2)

    cube = 2 * 4**3
    plain, remat = (flops(jax.grad(loss(wrap), (0, 1)), (4, 4), (4, 4)) for wrap in (lambda f: f, jax.checkpoint))
    assert plain == Count(6 * cube, wide=6 * cube)
    assert remat == Count(7 * cube, repeated=cube, wide=7 * cube)  # only the first product is needed again

    def in_loop(x, w):
        body = jax.checkpoint(lambda x: jnp.sin(x @ w) @ w)
        return lax.scan(lambda x, _: (body(x), None), x, None, length=3)[0].sum()

    assert flops(jax.grad(in_loop, (0, 1)), (4, 4), (4, 4)) == Count(21 * cube, repeated=3 * cube, wide=21 * cube)


def test_flops_of_cudnn_attention(monkeypatch):
    """Traced without a GPU. The gradient recomputes the similarities."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_is_flash_attention", lambda *_, **__: None)
    x = jnp.zeros((2, 6, 3, 8), jnp.bfloat16)

    def loss(implementation, q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation).astype(jnp.float32).sum()

    def counted(implementation):
        gradient = jax.value_and_grad(functools.partial(loss, implementation), (0, 1, 2))
        return count(jax.make_jaxpr(gradient)(x, x, x))

    product = 2 * 2 * 3 * 6 * 6 * 8
    assert counted("cudnn") == (7 * product, product, 0, 0)
    assert counted("xla").flops == 6 * product


def test_largest_results_of_a_trace():
    """Also inside a loop; bytes are per device, and equal shapes appear once."""
    body = lambda x, _: (jnp.sum(x @ x.T @ x, 0, keepdims=True) + x, None)  # noqa: E731
    program = jax.make_jaxpr(lambda x: lax.scan(body, x, None, length=3)[0])(jax.ShapeDtypeStruct((64, 8), jnp.float32))
    found = largest(program, devices=4, most=2)
    assert [(x["bytes"], x["shape"]) for x in found] == [(64 * 64 * 4 // 4, "f32[64,64]"), (64 * 8 * 4 // 4, "f32[64,8]")]
    assert found[0]["of"] == "dot_general"


def test_flops_of_shard_map_count_all_devices():
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2}, jax.devices()[:8])
    each = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert flops(each, (16, 5)).flops == 8 * (2 * 4 * 4 * 5)  # the two along 'fsdp' do the same


def vit_forward(depth, width, hidden, tokens, patch):
    block = 2 * tokens * width * (4 * width + 2 * hidden) + 4 * tokens**2 * width
    return depth * block + 2 * (tokens - 1) * width * 3 * patch**2


@pytest.mark.full
@pytest.mark.parametrize(
    ("spec", "forward"),
    [
        (dict(name="vit", variant="B/16"), vit_forward(12, 768, 3072, 197, 16)),
        (dict(name="resnet", depth=50), 2 * 4.09e9),  # He et al. 2016; torchvision's 4.09 GMACs
    ],
    ids=["ViT-B/16", "ResNet-50"],
)
def test_flops_of_vit_and_resnet(spec, forward):
    """One image of 224 pixels: the forward pass, and three times that for a step (without the gradient of the image)."""
    network = build_encoder(spec)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(lambda x: network.init(jax.random.key(0), x, train=False), images)

    def pooled(params, images):
        return jnp.sum(network.apply(params, images, train=False)["pooled"])

    assert count(jax.make_jaxpr(pooled)(params, images)).flops == pytest.approx(forward, rel=0.05)
    assert count(jax.make_jaxpr(jax.grad(pooled))(params, images)).flops == pytest.approx(3 * forward, rel=0.05)


MESH = {"data": 2, "fsdp": 4, "tensor": 1}


@pytest.mark.parametrize(
    ("line", "groups", "axes"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", [[0, 1, 2, 3], [4, 5, 6, 7]], "fsdp"),
        ("replica_groups={}", [list(range(8))], "data+fsdp"),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]], "fsdp"),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]], "data"),
        ("replica_groups=[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]], "part of fsdp"),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]], "fsdp"),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]], "data"),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", [list(range(8))], "data+fsdp"),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]], "data"),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", [[0, 1, 2, 3], [4, 5, 6, 7]], "fsdp"),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", [[0, 1], [1, 2], [2, 3], [3, 0]], "part of fsdp"),
    ],
)
def test_device_groups_and_mesh_axes(line, groups, axes):
    found = device_groups(f"all-reduce(%x), {line}, metadata={{}}", 8)
    assert found.tolist() == groups
    assert mesh_axes(found, MESH) == axes
    with pytest.raises(ValueError, match="in an unknown form"):
        device_groups("replica_groups=new", 8)


def test_collectives_of_a_compiled_program():
    """Collectives along known axes, one of them in a loop of length 7."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4}, jax.devices()[:8])

    def program(x):  # [4, 6] on each device
        def body(total, _):
            return jnp.sin(lax.psum(total, "data")), None

        total, _ = lax.scan(body, x, None, length=7)
        whole = lax.all_gather(total, "fsdp", axis=0, tiled=True)  # [16, 6]
        part = lax.psum_scatter(jnp.cos(whole), ("data", "fsdp"), scatter_dimension=0, tiled=True)  # [2, 6]
        return lax.ppermute(part, "fsdp", [(i, (i + 1) % 4) for i in range(4)])

    sharded = jax.shard_map(program, mesh=mesh, in_specs=P("fsdp"), out_specs=P(("data", "fsdp")), check_vma=False)
    placed = jax.ShapeDtypeStruct((16, 6), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    hlo = jax.jit(sharded).lower(placed).compile().as_text()
    found, unknown = collectives(hlo, mesh.shape)
    assert unknown == 0
    expected = {
        Collective("all-reduce", "data", 2, 7, 7 * 4 * 6 * 4),
        Collective("all-gather", "fsdp", 4, 1, 16 * 6 * 4),
        Collective("reduce-scatter", "data+fsdp", 8, 1, 16 * 6 * 4),
        Collective("collective-permute", "part of fsdp", 2, 1, 2 * 6 * 4),
    }
    assert set(found) == expected
    assert [x.wire for x in found] == sorted((x.wire for x in found), reverse=True)
    wire = {x.kind: x.wire for x in found}
    np.testing.assert_allclose(
        [wire[kind] for kind in ("all-reduce", "all-gather", "reduce-scatter", "collective-permute")],
        [2 * 1 / 2 * 672, 3 / 4 * 384, 7 / 8 * 384, 48],
    )


TPU = """HloModule jit_step

%all-reduce-scatter.1 (p: bf16[64,128]) -> bf16[8,128] {
  %p = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %sum = bf16[64,128]{1,0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %slice = bf16[8,128]{1,0} dynamic-slice(%sum, %i, %z)
}

%condition (t: (s32[], f32[4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(12)
  ROOT %less = pred[] compare(%counter, %bound), direction=LT
}

%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %start = (f32[4]{0}, f32[32]{0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %done = f32[32]{0} all-gather-done(%start)
  %begun = ((bf16[64,128]{1,0}), bf16[8,128]{1,0}) reduce-scatter-start(%y), replica_groups=[1,8]<=[8], dimensions={0},
  to_apply=%add %ended = bf16[8,128]{1,0} reduce-scatter-done(%begun) %scattered = bf16[8,128]{1,0} fusion(%y), kind=kCustom,
  calls=%all-reduce-scatter.1
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %loop = (s32[], f32[4]{0}) while(%t), condition=%condition, body=%body
  %sent = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,4},{4,0}}
}
"""


def test_collectives_of_a_tpu_program():
    """Asynchronous pairs, a loop whose length is in its condition, and a fusion that is a reduce-scatter."""
    found, unknown = collectives(TPU, MESH)
    assert unknown == 0
    assert set(found) == {
        Collective("all-gather", "data+fsdp", 8, 12, 12 * 32 * 4),
        Collective("reduce-scatter", "data+fsdp", 8, 24, 24 * 64 * 128 * 2),  # half of them asynchronous, as on GPUs
        Collective("collective-permute", "data", 2, 1, 4 * 4),
    }
    sent = '  %s = (f32[32,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%x, %t), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:15}"}\n'
    found, _ = collectives(TPU.replace("  %loop", sent + "  %loop"), MESH)
    assert Collective("send", "slices", 2, 1, 32 * 8 * 128 * 4) in found  # to the other slice of a job
    assert collectives(TPU.replace("constant(12)", "parameter(0)"), MESH)[1] > 0
