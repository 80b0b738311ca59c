"""Which rows of a batch each process reads, and shardings of host arrays and states."""

import types

import jax
import numpy as np
import pytest
from feature_clouds import mesh_of

from ssl_jax.engine import loop, sharding
from ssl_jax.engine.method import State


def mesh_by_process(processes):
    """A mesh of fake devices; `processes` [data, fsdp, tensor] are the processes that own them."""
    devices = [types.SimpleNamespace(process_index=i) for i in np.ravel(processes)]
    grid = np.array(devices, object).reshape(np.shape(processes))
    shape = dict(zip(sharding.AXES, grid.shape, strict=True))
    return types.SimpleNamespace(devices=grid, shape=shape)


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        ([[[0], [0]], [[1], [1]]], [(0, 1), (2, 3)]),
        ([[[0, 1]]], [(0,), (0,)]),  # all devices along 'tensor' have the same rows
        ([[[0, 0, 1, 1]], [[2, 2, 3, 3]]], [(0,), (0,), (1,), (1,)]),
        ([[[0], [0], [1], [1]], [[0], [0], [1], [1]]], [(0, 1, 4, 5), (2, 3, 6, 7)]),  # hosts of two by two chips
        ([[[0, 0, 0]], [[0, 1, 1]], [[1, 1, 1]]], [(0, 1), (1, 2)]),
    ],
)
def test_local_parts_are_those_of_the_process_devices(monkeypatch, processes, expected):
    for process, own in enumerate(expected):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert sharding.local_parts.__wrapped__(mesh_by_process(processes)) == (own, np.shape(processes)[0] * np.shape(processes)[1])


def test_from_local_rows_equals_the_batch_sharding():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert sharding.local_parts(mesh) == ((0, 1, 2, 3), 4)
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    with jax.transfer_guard("disallow"):
        batch = sharding.from_local_rows(rows, mesh)
    np.testing.assert_array_equal(batch, rows)
    assert batch.sharding.spec == sharding.BATCH
    for place, devices in enumerate(mesh.devices.reshape(4, 2)):
        held = [shard.data for shard in batch.addressable_shards if shard.device in devices]
        assert len(held) == 2 and all(np.array_equal(x, rows[2 * place : 2 * place + 2]) for x in held)


def test_from_local_rows_on_one_device():
    np.testing.assert_array_equal(sharding.from_local_rows(np.arange(3), mesh_of(1)), np.arange(3))


def test_frozen_arrays_are_put_without_gathering_from_other_processes(monkeypatch):
    """`device_put` would gather the host arrays of all processes to compare them."""
    monkeypatch.setattr(jax, "device_put", None)
    mesh = sharding.make_mesh({"data": 8})
    placed = loop._put(np.arange(6), jax.NamedSharding(mesh, sharding.P()))
    np.testing.assert_array_equal(placed, np.arange(6))
    assert placed.is_fully_replicated and len(placed.addressable_shards) == 8


def test_ema_is_sharded_like_its_group():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    params = {"one": {"kernel": np.zeros((64, 64))}, "other": {"kernel": np.zeros((64, 128))}}
    mutable = {"ema": {"kernel": np.zeros((64, 128))}, "batch_stats": {"mean": np.zeros(2048)}, "count": np.zeros(())}
    state = State(np.int32(0), params, {}, mutable, {})
    placed = sharding.shard_state((("one", (None, "fsdp")), (".*", ("fsdp", None))), jax.eval_shape(lambda: state), mesh)
    assert placed.params["one"]["kernel"].spec == sharding.P(None, "fsdp")
    assert placed.mutable["ema"]["kernel"].spec == placed.params["other"]["kernel"].spec == sharding.P("fsdp", None)
    assert placed.mutable["batch_stats"]["mean"].spec == placed.mutable["count"].spec == sharding.P()
