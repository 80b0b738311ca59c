"""Device meshes, shardings from (regex, rule) lists, and transfers between hosts and devices. Parameters never exist unsharded."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ssl_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))  # every batch dimension is sharded over both axes


def make_mesh(spec: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes ('data', 'fsdp', 'tensor') of the sizes in `spec`; one size may be -1 (all remaining devices).

    Raises:
        UserError: an unknown axis, an invalid size, or a product of sizes that is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: int(spec.get(axis, 1)) for axis in AXES}
    unknown, free = set(spec) - set(AXES), [axis for axis in AXES if sizes[axis] == -1]
    if unknown:
        raise UserError(f"config.mesh: unknown axis {sorted(unknown)}; the axes are {', '.join(AXES)}")
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"config.mesh={sizes}: sizes are positive and at most one is -1 (all remaining devices)")
    given = math.prod(size for size in sizes.values() if size != -1)
    if free and len(devices) % given == 0:
        sizes[free[0]] = len(devices) // given
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"config.mesh={sizes} needs a multiple of {given} devices, but there are {len(devices)}; "
            "make the product of the sizes the number of devices, or set one to -1"
        )
    grid = np.asarray(devices).reshape([sizes[axis] for axis in AXES])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def warm_up_connections(mesh: Mesh) -> None:
    """With several processes on CPUs, connect all groups of devices now, while all processes are at the same point of the program.

    Gloo connects a group at its first collective, and gives up if a process arrives 30 s after the others. Without this, a process
    that compiles the first step for longer would fail.
    """
    if jax.process_count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return
    long = [axis for axis in AXES if mesh.shape[axis] > 1]
    everywhere = jax.jit(lambda: jnp.ones(mesh.size), out_shardings=NamedSharding(mesh, P(AXES)))()
    for axes in (group for n in range(1, len(long) + 1) for group in itertools.combinations(long, n)):
        others = P(tuple(axis for axis in AXES if axis not in axes))
        summed = jax.shard_map(lambda x, axes=axes: jax.lax.psum(x, axes), mesh=mesh, in_specs=P(AXES), out_specs=others)
        jax.block_until_ready(jax.jit(summed)(everywhere))


@functools.cache
def local_parts(mesh: Mesh) -> tuple[tuple[int, ...], int]:
    """(indices of the parts of a batch that devices of this process hold, number of all parts), under the sharding `BATCH`.

    Processes along 'tensor' hold the same parts, and the devices of a TPU host need not be adjacent.
    """
    grid = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    own = tuple(i for i, devices in enumerate(grid) if any(d.process_index == jax.process_index() for d in devices))
    return own, len(grid)


def from_local_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """A global array [B, ...] with sharding `BATCH` from the rows [b, ...] of this process, those of its `local_parts`."""
    own, count = local_parts(mesh)
    assert len(rows) % len(own) == 0, f"{len(rows)} rows are not {len(own)} equal parts"
    size = len(rows) // len(own)
    first = {part * size: i * size for i, part in enumerate(own)}

    def read(index):
        start = first[index[0].indices(size * count)[0]]
        return rows[start : start + size]

    with jax.transfer_guard_host_to_device("allow"):  # an explicit transfer, like device_put, which the guard does not recognize
        return jax.make_array_from_callback((size * count, *rows.shape[1:]), NamedSharding(mesh, BATCH), read)


def put_global(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array, equal on all processes, as a global array. Each device receives only its own shard.

    `device_put` would compare the arrays of all processes, for which every process gathers the copies of all others.
    """
    with jax.transfer_guard_host_to_device("allow"):  # an explicit transfer, like device_put, which the guard does not recognize
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def to_host(tree, mesh: Mesh):
    """A tree of global arrays as complete NumPy arrays in every process."""
    return jax.device_get(tree if jax.process_count() == 1 else _gather(mesh)(tree))


@functools.cache
def _gather(mesh: Mesh):
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))


def leaf_names(tree) -> list[str]:
    """Names of the leaves, such as 'net/encoder/conv1/kernel', in flattening order."""
    return ["/".join(_key_name(k) for k in path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _key_name(key) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def match(rules: Sequence[tuple[str, object]], names: Sequence[str], what: str, all_used: bool = True) -> list[object]:
    """For each name, the value of the first rule whose regex matches part of it. `what` names the config key in messages.

    Raises:
        UserError: a rule is not a regex or (with `all_used`) matches nothing, or no rule matches a name.
    """
    try:
        compiled = [(re.compile(pattern), value) for pattern, value in rules]
    except re.error as error:
        raise UserError(f"{what}: {error.pattern!r} is not a regular expression ({error})") from None
    found, used = [], set()
    for name in names:
        hits = [i for i, (pattern, _) in enumerate(compiled) if pattern.search(name)]
        if not hits:
            raise UserError(f"{what}: no rule matches parameter {name!r}; end the list with ('.*', value)")
        used.update(hits)
        found.append(compiled[hits[0]][1])
    idle = [rules[i][0] for i in range(len(rules)) if i not in used]
    if idle and all_used:
        raise UserError(f"{what}: rule {idle[0]!r} matches no parameter; parameters are named like {names[0]!r}")
    return found


def spec_of(rule, shape: tuple[int, ...], mesh: Mesh, name: str) -> P:
    """The PartitionSpec that `rule` gives the array `name` of this shape.

    Rules: 'replicate'; 'fsdp' (shards the largest divisible dimension over 'fsdp'); or a sequence of mesh axes or None, one per
    dimension. A shorter sequence applies to the last dimensions.

    Raises:
        UserError: an unknown rule or axis, or a dimension that does not divide.
    """
    if rule == "replicate" or not shape:
        return P()
    if rule == "fsdp":
        size = mesh.shape["fsdp"]
        dims = [d for d in range(len(shape)) if size > 1 and shape[d] % size == 0 and math.prod(shape) >= 1024]
        if not dims:
            return P()
        largest = max(dims, key=lambda d: shape[d])
        return P(*("fsdp" if d == largest else None for d in range(len(shape))))
    if isinstance(rule, str) or len(rule) > len(shape):
        raise UserError(f"config.sharding: rule {rule!r} does not fit {name!r} of shape {shape}; use 'replicate', 'fsdp' or axes")
    axes = (None,) * (len(shape) - len(rule)) + tuple(rule)
    for axis, dim in zip(axes, shape, strict=True):
        if axis is not None and axis not in mesh.shape:
            raise UserError(f"config.sharding: unknown mesh axis {axis!r} for {name!r}; the axes are {', '.join(AXES)}")
        if axis is not None and dim % mesh.shape[axis]:
            raise UserError(f"config.sharding: {name!r} of shape {shape} does not divide by {axis}={mesh.shape[axis]}")
    return P(*axes)


def shard_state(rules: Sequence[tuple[str, object]], shapes, mesh: Mesh):
    """Shardings for a `State` of shapes. `rules` match 'group/module/leaf' names of parameters.

    Optimizer moments are sharded like their parameters, and averages of a group like the group. Counters, statistics and frozen
    trees are replicated.
    """
    names = leaf_names(shapes.params)
    rule_of = dict(zip(names, match(rules, names, "config.sharding"), strict=True))
    shape_of = dict(zip(names, (x.shape for x in jax.tree.leaves(shapes.params)), strict=True))

    def leaf_sharding(group: str, path: tuple, leaf) -> NamedSharding:
        parts = [_key_name(key) for key in path]
        owners = ("/".join([group, *parts[i:]]) for i in range(len(parts)))  # the path of a moment ends with that of its parameter
        owner = next((name for name in owners if name in rule_of), None)
        if owner is None:
            return NamedSharding(mesh, P())
        per_dimension = not isinstance(rule_of[owner], str)  # does not apply to a factored moment, which has fewer dimensions
        rule = "fsdp" if per_dimension and leaf.shape != shape_of[owner] else rule_of[owner]
        return NamedSharding(mesh, spec_of(rule, leaf.shape, mesh, owner))

    def group_shardings(trees: Mapping) -> dict:
        return {
            group: jax.tree_util.tree_map_with_path(lambda path, leaf, group=group: leaf_sharding(group, path, leaf), tree)
            for group, tree in trees.items()
        }

    def leaf_shapes(tree):
        return jax.tree.map(lambda x: x.shape, tree)

    replicated, params = NamedSharding(mesh, P()), group_shardings(shapes.params)
    all_replicated = jax.tree.map(lambda _: replicated, shapes)
    group_of_shapes = [(leaf_shapes(tree), group) for group, tree in shapes.params.items()]
    mutable = {
        name: next((params[group] for like, group in group_of_shapes if like == leaf_shapes(tree)), all_replicated.mutable[name])
        for name, tree in shapes.mutable.items()
    }
    return all_replicated._replace(params=params, opt=group_shardings(shapes.opt), mutable=mutable)


def check_batch(batch_size: int, mesh: Mesh, parts: int = 1, name: str = "batch_size") -> None:
    """Raises UserError unless the batch size config.<name> divides by the devices along 'data' and 'fsdp' times `parts`."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size < 1 or batch_size % (devices * parts):
        raise UserError(
            f"config.{name}={batch_size} does not divide by {devices} devices"
            + (f" x {parts} sub-batches" if parts > 1 else "")
            + f"; the nearest that does is {max(1, round(batch_size / (devices * parts))) * devices * parts}"
        )
