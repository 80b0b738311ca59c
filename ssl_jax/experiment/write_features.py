"""Writes the features of a split to files, in shards that several processes share and that a killed run need not repeat.

A shard is a range of examples. Each is encoded by one process on its own devices and renamed into place when it is complete, so the
shards that are there are right, and any process may write those that are not.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ssl_jax import files
from ssl_jax.data.catalog import open_data
from ssl_jax.data.labels import label_form
from ssl_jax.data.pipeline import INDEX, ROWS, EvalBatches, eval_batches, iterate
from ssl_jax.data.sources import Source, is_folder_of_images
from ssl_jax.engine import sharding
from ssl_jax.engine.checkpoint import Checkpoints, write_json
from ssl_jax.engine.method import Method
from ssl_jax.engine.processes import barrier
from ssl_jax.engine.records import read_json
from ssl_jax.errors import UserError, workdir_not_made
from ssl_jax.evals.lib.features import pool
from ssl_jax.experiment import config as configs
from ssl_jax.experiment import feature_files
from ssl_jax.experiment.build import check_eval_ops, compute_type, jitted_in
from ssl_jax.experiment.distributed import is_lead, start_jax
from ssl_jax.experiment.overrides import apply_overrides, refuse_derived
from ssl_jax.experiment.stages import fingerprint_of, open_stages
from ssl_jax.experiment.weights import open_weights
from ssl_jax.experiment.workdir import read_config
from ssl_jax.methods import build_method
from ssl_jax.models.conv import use_convolutions

log = logging.getLogger(__name__)
CARD, LOCK = "features.json", ".lock"
PLACES = ("weights", "workdir", "data")  # which may be renamed; fingerprints say whether they hold the same


class FeatureSource(NamedTuple):
    """An encoder, and the config whose data it encodes."""

    config: Any
    method: Method
    weights: dict  # {'params', 'mutable'}; `mutable` holds the frozen stages
    about: dict  # whose weights they are, for the card


def of_weights(path: str, path_and_variant: str, overrides: Sequence[str]) -> FeatureSource:
    """The encoder in a file of weights, with the data of a config. Raises UserError."""
    refuse_derived(overrides)
    config = configs.load(path_and_variant, overrides)
    start_jax()
    opened = open_weights(path, config)
    return FeatureSource(opened.config, opened.method, opened.weights, {"weights": path, "fingerprint": opened.fingerprint})


def of_run(workdir: Path, overrides: Sequence[str], step: int | None) -> FeatureSource:
    """Checkpoint `step` (None: the newest) of a run, whose data `overrides` may change. Raises UserError."""
    refuse_derived(overrides)
    trained = read_config(workdir)
    config = apply_overrides(trained.copy_and_resolve_references(), overrides)
    check_eval_ops(config)
    start_jax()
    use_convolutions(config.get("convolutions", "auto"))
    own = config.copy_and_resolve_references()
    with own.unlocked():
        own.dtype = config.dtype = compute_type(config.dtype)
        del own.data
        own.data = trained.data  # of whose classes and sizes its weights are
    own, frozen = open_stages(own)
    saved = Checkpoints(workdir / "checkpoints", read_only=True)
    try:
        steps = saved.agreed_steps()
        if not steps or (step is not None and step not in steps):
            raise UserError(f"{workdir} has no checkpoint {'' if step is None else step}; there are {steps or 'none'}")
        step = steps[-1] if step is None else step
        weights = saved.read(step)
    finally:
        saved.close()
    about = {"workdir": str(workdir), "step": step, "fingerprint": fingerprint_of(weights)}
    weights["mutable"] = {**weights["mutable"], **frozen}
    return FeatureSource(config, build_method(own), weights, about)


def write(source: FeatureSource, output: Path, form: str, split: str | None, layer: str, shard_rows: int) -> None:
    """Write `layer` of all images of a split to `output`, or what of it is not there yet.

    Args:
        form: 'npy' or 'parquet'.
        split: of the data; None: every image of a folder of images, else the train split of the config.
        shard_rows: examples of a shard, rounded up to whole batches.

    Raises:
        UserError: no such split or layer, features that are not finite, or `output` has others.
        MachineFault: the disk fails.
    """
    config = source.config
    feature_files.check_format(form)
    data = _open(config, split)
    feature_files.check_names(data, form)
    names = ("image", "label") if label_form(data)[0] else ("image",)
    batches = eval_batches(data, config.data.eval_ops, config.eval_batch_size, inputs=names)
    encode, width = _encoder(source, batches, layer)
    shard_examples = -(-shard_rows // config.eval_batch_size) * config.eval_batch_size
    card = {
        **source.about, "layer": layer, "width": width, "dtype": source.config.dtype,
        "data": config.data.name, "split": data.split, "data_fingerprint": data.fingerprint, "examples": len(data),
        "eval_ops": configs.plain(config.data)["eval_ops"], "format": form, "shard_examples": shard_examples,
    }  # fmt: skip
    if data.label_names and "label" in names:
        card["classes"] = list(data.label_names)
    with _begun(output, card) as complete:
        if complete:
            log.info("%s is complete", output)
        else:
            _write_missing(source, output, form, data, batches, encode, card)
        if is_lead():
            feature_files.clean(output, form)


def _write_missing(source: FeatureSource, output: Path, form: str, data: Source, batches: EvalBatches, encode, card: dict) -> None:
    """Write the shards that are not there, then join them."""
    width, each = card["width"], card["shard_examples"] // batches.batch_size  # batches of a shard
    count = -(-len(batches) // each)
    folder = feature_files.folder_of(output, form)
    missing = [number for number in range(count) if not feature_files.shard(folder, form, number, count).exists()]
    if len(missing) < count:
        log.info("%s has %d of %d shards; going on", output, count - len(missing), count)
    for number in missing:
        if number % jax.process_count() != jax.process_index():  # by number, since the others write while this process lists
            continue
        stop, workers = min((number + 1) * each, len(batches)), source.config.data.workers
        rows = _encoded(encode, batches, number * each, stop, workers, width, card["layer"])
        feature_files.write_shard(feature_files.shard(folder, form, number, count), form, data, *rows)
        log.info("shard %d of %d: %d rows", number + 1, count, len(rows[0]))
    barrier("features")
    if is_lead():
        rows = feature_files.finish(output, form, data, count, width)
        write_json(output / CARD, {**card, "rows": rows})
        left_out = f"; {len(data) - rows} unreadable images are left out" if rows < len(data) else ""
        log.info("%s: %d rows of %d numbers%s", output, rows, width, left_out)
    barrier("written")


def _open(config, split: str | None) -> Source:
    if split is None:
        split = "all" if is_folder_of_images(config.data.name, config.data.data_dir) else config.data.train_split
    return open_data(config.data, split)


def _encoder(source: FeatureSource, batches: EvalBatches, layer: str):
    """(images uint8 [B, H, W, 3] of the host -> float32 [B, D] on the devices of this process, D)."""
    mesh = sharding.make_mesh({"data": -1}, jax.local_devices())
    sharding.check_batch(batches.batch_size, mesh, name="eval_batch_size")
    shape, dtype = batches.spec["image"]
    images = jax.ShapeDtypeStruct((batches.batch_size, *shape), dtype)
    found = jax.eval_shape(source.method.encode, source.weights["params"], source.weights["mutable"], images)
    if layer not in found:
        raise UserError(f"--layer={layer} does not exist; the encoder has {', '.join(found)}")
    whole = jax.sharding.NamedSharding(mesh, sharding.P())
    params, mutable = jax.tree.map(
        lambda x: sharding.put_global(np.asarray(x), whole), (source.weights["params"], source.weights["mutable"])
    )
    run = jitted_in(mesh, lambda params, mutable, images: pool(source.method.encode(params, mutable, images)[layer]))
    place = functools.partial(jax.device_put, device=jax.sharding.NamedSharding(mesh, sharding.BATCH))
    return lambda images: run(params, mutable, place(images)), int(jax.eval_shape(pool, found[layer]).shape[-1])


def _encoded(encode, batches: EvalBatches, start: int, stop: int, workers: int, width: int, layer: str):
    """(features float32 [N, D], labels int32 or None, numbers in the source int64 [N]) of the readable images of some batches."""
    features, labels, index, pending = [np.zeros((0, width), np.float32)], [], [np.zeros(0, np.int64)], None

    def fetch(rows, valid):
        features.append(np.asarray(rows)[valid])

    for batch in iterate(batches, start, stop, workers):
        valid, rows = batch[ROWS], encode(batch["image"])
        if pending is not None:
            fetch(*pending)  # one batch behind the encoder
        pending = rows, valid
        index.append(batch[INDEX][valid].astype(np.int64))
        if "label" in batch:
            labels.append(batch["label"][valid].astype(np.int32))
    fetch(*pending)
    x = np.concatenate(features)
    if not np.isfinite(x).all():
        raise UserError(f"--layer={layer} has features that are not finite; the model diverged or overflows its type")
    return x, np.concatenate(labels) if labels else None, np.concatenate(index)


@contextlib.contextmanager
def _begun(output: Path, card: dict) -> Iterator[bool]:
    """Context in which this run alone writes to `output`, and notes whose features it gets; yields whether it is complete.

    Raises:
        UserError: it has other features, or another run writes there.
    """
    path = output / CARD
    before = read_json(path, dict, remedy="choose another --output") if path.exists() else None
    if before is not None:
        new = {key: value for key, value in card.items() if before.get(key) != value and key not in PLACES}
        other = [f"{key} {before.get(key)}, here {value}" for key, value in new.items()]
        if other:
            raise UserError(f"--output={output} has other features ({'; '.join(other[:3])}); choose another")
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = files.lock(output / LOCK) if is_lead() else contextlib.nullcontext()
    except BlockingIOError:
        raise UserError(f"--output={output} is in use by another process; wait for it or choose another directory") from None
    except OSError as error:
        raise workdir_not_made(output, error, "--output") from None
    with lock:
        if before is None:
            write_json(path, card)
        yield before is not None and "rows" in before
