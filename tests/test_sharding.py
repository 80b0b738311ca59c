"""Which rows of a batch a process reads, and where they go."""

import types

import jax
import numpy as np
import pytest
from feature_clouds import mesh_of

from ssl_jax.engine import loop, sharding
from ssl_jax.engine.method import State


def mesh_by_process(processes):
    """A mesh [data, fsdp, tensor] of devices that belong to these processes."""
    devices = [types.SimpleNamespace(process_index=i) for i in np.ravel(processes)]
    grid = np.array(devices, object).reshape(np.shape(processes))
    shape = dict(zip(sharding.AXES, grid.shape, strict=True))
    return types.SimpleNamespace(devices=grid, shape=shape)


@pytest.mark.parametrize(
    ("processes", "told"),
    [
        ([[[0], [0]], [[1], [1]]], [(0, 1), (2, 3)]),
        ([[[0, 1]]], [(0,), (0,)]),  # along 'tensor' all have the same rows
        ([[[0, 0, 1, 1]], [[2, 2, 3, 3]]], [(0,), (0,), (1,), (1,)]),
        ([[[0], [0], [1], [1]], [[0], [0], [1], [1]]], [(0, 1, 4, 5), (2, 3, 6, 7)]),  # hosts of two by two chips
        ([[[0, 0, 0]], [[0, 1, 1]], [[1, 1, 1]]], [(0, 1), (1, 2)]),
    ],
)
def test_a_process_reads_the_rows_of_its_devices(monkeypatch, processes, told):
    for process, own in enumerate(told):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert sharding.local_parts.__wrapped__(mesh_by_process(processes)) == (own, np.shape(processes)[0] * np.shape(processes)[1])


def test_parts_are_those_of_the_sharding():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert sharding.local_parts(mesh) == ((0, 1, 2, 3), 4)
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    with jax.transfer_guard("disallow"):
        spread = sharding.from_local_rows(rows, mesh)
    np.testing.assert_array_equal(spread, rows)
    assert spread.sharding.spec == sharding.BATCH
    for place, devices in enumerate(mesh.devices.reshape(4, 2)):
        held = [shard.data for shard in spread.addressable_shards if shard.device in devices]
        assert len(held) == 2 and all(np.array_equal(x, rows[2 * place : 2 * place + 2]) for x in held)


def test_rows_of_one_device():
    np.testing.assert_array_equal(sharding.from_local_rows(np.arange(3), mesh_of(1)), np.arange(3))


def test_what_is_frozen_is_not_compared_between_processes(monkeypatch):
    """As `device_put` of host arrays would: it gathers those of all of them."""
    monkeypatch.setattr(jax, "device_put", None)
    mesh = sharding.make_mesh({"data": 8})
    placed = loop._place(np.arange(6), jax.NamedSharding(mesh, sharding.P()))
    np.testing.assert_array_equal(placed, np.arange(6))
    assert placed.is_fully_replicated and len(placed.addressable_shards) == 8


def test_an_average_of_a_group_lies_as_the_group_does():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    params = {"one": {"kernel": np.zeros((64, 64))}, "other": {"kernel": np.zeros((64, 128))}}
    mutable = {"ema": {"kernel": np.zeros((64, 128))}, "batch_stats": {"mean": np.zeros(2048)}, "count": np.zeros(())}
    state = State(np.int32(0), params, {}, mutable, {})
    placed = sharding.shard_state((("one", (None, "fsdp")), (".*", ("fsdp", None))), jax.eval_shape(lambda: state), mesh)
    assert placed.params["one"]["kernel"].spec == sharding.P(None, "fsdp")
    assert placed.mutable["ema"]["kernel"].spec == placed.params["other"]["kernel"].spec == sharding.P("fsdp", None)
    assert placed.mutable["batch_stats"]["mean"].spec == placed.mutable["count"].spec == sharding.P()
