"""Memory traffic read from HLO text: against XLA's xla_bytes count, and by hand where XLA counts a loop once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.rehearsal.traffic import traffic


def compiled(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


def xla_bytes(program) -> float:
    return program.cost_analysis()["bytes accessed"]


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x, y: x @ y, ((64, 128), (128, 32))),
        (lambda x: jax.nn.relu(x * 2 + 1).sum(), ((64, 128),)),
        (lambda x, y: jax.grad(lambda y: jnp.tanh(x @ y).mean())(y), ((64, 128), (128, 32))),
        (lambda x, y: jax.lax.conv(x, y, (1, 1), "SAME").max(), ((2, 8, 16, 16), (4, 8, 3, 3))),
    ],
)
def test_traffic_equals_the_count_of_xla_without_loops(function, shapes):
    program = compiled(function, *shapes)
    assert xla_bytes(program) > 4 * np.prod(shapes[0])
    np.testing.assert_allclose(traffic(program.as_text()), xla_bytes(program), rtol=0.01)


def test_traffic_of_a_loop_counts_every_iteration():
    def once(x, y):
        return jnp.tanh(x @ y)

    def often(x, y):
        return jax.lax.fori_loop(0, 10, lambda _, x: once(x, y), x)

    shapes = (256, 256), (256, 256)
    single, loop = compiled(once, *shapes), compiled(often, *shapes)
    np.testing.assert_allclose(traffic(loop.as_text()), 10 * traffic(single.as_text()), rtol=0.1)
    assert xla_bytes(loop) < 3 * xla_bytes(single)


PARTS = """
%fused_slice (param_0: f32[100,8], param_1: s32[]) -> f32[1,8] {
  %param_0 = f32[100,8]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %part = f32[1,8]{1,0} dynamic-slice(%param_0, %param_1, %zero), dynamic_slice_sizes={1,8}
}

%fused_update (param_0.1: f32[100,8], param_1.1: f32[1,8], param_2: s32[]) -> f32[100,8] {
  %param_0.1 = f32[100,8]{1,0} parameter(0)
  %param_1.1 = f32[1,8]{1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %whole = f32[100,8]{1,0} dynamic-update-slice(%param_0.1, %param_1.1, %param_2, %zero.1)
}

ENTRY %main (x: f32[100,8], i: s32[]) -> f32[100,8] {
  %x = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %one = f32[1,8]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused_slice
  ROOT %all = f32[100,8]{1,0} fusion(%x, %one, %i), kind=kLoop, calls=%fused_update
}
"""


def test_slices_and_in_place_updates_count_only_their_part():
    row, index = 8 * 4, 4
    assert traffic(PARTS) == (row + index + row) + (row + index + row)
