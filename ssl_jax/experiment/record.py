"""`Experiment`: a config with everything that runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ssl_jax.data.pipeline import TrainBatches
from ssl_jax.data.vocabulary import Vocabulary
from ssl_jax.engine.loop import CompiledRun
from ssl_jax.engine.method import Method, ModelFns, Sampler


class Experiment(NamedTuple):
    """A config with its data, its method and its compiled step, from `build.build_experiment`."""

    config: Any  # resolved: image_shape, num_classes, examples and dtype are filled in
    method: Method
    batches: TrainBatches
    run: CompiledRun
    schedules: Mapping
    durations: Mapping[str, int]  # steps: 'total', 'evaluate', 'checkpoint'
    encode: Callable  # jitted method.encode
    encode_views: Callable | None  # jitted, for alignment
    fns: ModelFns  # method.fns, jitted
    sampler: Sampler | None  # method.sampler, jitted
    cache: dict  # statistics of real images that evaluations share; they do not change within a run
    vocabulary: Mapping[str, Vocabulary]  # of the texts that become token ids
