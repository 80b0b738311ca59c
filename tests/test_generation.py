"""Evaluations of samples and of discriminators, against their definitions, on several devices, and in a GAN run."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feature_clouds import mesh_of

from ssl_jax import export
from ssl_jax.engine.method import ModelFns
from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.evals.context import Context, EvaluatedModel, Extractor, pixel_context
from ssl_jax.evals.kinds import discriminator_memorization, generation
from ssl_jax.evals.lib import distances
from ssl_jax.evals.lib.resize import to_size
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.build import build_experiment
from ssl_jax.experiment.contexts import model_context
from ssl_jax.experiment.extractors import open_extractor

ROOT = pathlib.Path(__file__).parent.parent


def scene(seed, count, kinds=4, noise=12.0, size=16):
    """uint8 [count, size, size, 3]: gratings of `kinds` kinds in order, each with its direction and color."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    out = []
    for i in range(count):
        kind = i * kinds // count
        wave = np.sin(0.7 * (x * np.cos(kind * 0.8) + y * np.sin(kind * 0.8)) + generator.uniform(0, 6))
        color = np.array([np.cos(kind), np.sin(kind), np.cos(2 * kind)])
        out.append(127 + 80 * wave[..., None] * color + noise * generator.standard_normal((size, size, 3)))
    return np.clip(np.round(out), 0, 255).astype(np.uint8)


def batches_of(images, size=64):
    for start in range(0, len(images), size):
        part = images[start : start + size]
        mask = np.arange(size) < len(part)
        yield {"image": np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), np.uint8)]), "_valid": mask}


def sample_context(real, fake, mesh=None, cache=None, extractor=open_extractor, **options):
    """A context of arrays; `opened` lists the splits and samples that were read."""
    opened = []

    def open_batches(split):
        opened.append(split)
        return batches_of(real[split] if isinstance(real, dict) else real)

    def samples(count, seed, truncation):
        opened.append((count, seed, truncation))
        for start in range(0, count, 48):
            yield fake[start : min(start + 48, count)]

    fns = ModelFns(discriminate=options.pop("discriminate", None))
    cache = {} if cache is None else cache
    model = EvaluatedModel(lambda spec, mode: extractor(spec, mode, mesh), cache, fns, samples=samples)
    context = Context(lambda x: {"pooled": x}, open_batches, None, mesh, model=model, **options)
    context.opened = opened
    return context


def means(spec="means", mode="none", mesh=None):
    """A network whose features are the mean colors, in [0, 255], and whose logits are ten times those."""

    def encode(images):
        pooled = jnp.mean(images.astype(jnp.float32), (1, 2))
        return {"pooled": pooled, "logits": 10 * pooled}

    return Extractor("means", 3, jax.jit(encode), 3, "f" * 64, mode)


def test_generation_metrics_use_exactly_the_requested_images():
    real, fake = scene(0, 150), scene(1, 100, noise=30)
    got = generation.evaluate(sample_context(real, fake, extractor=means), examples=90, subsets=3, subset_size=40, seed=5, k=2)
    x, y = (images.astype(np.float64).mean((1, 2)) for images in (real, fake[:90]))
    expected = distances.frechet(distances.moments(x), distances.moments(y))
    assert got.metrics["frechet"] == pytest.approx(100 * expected / np.cov(x.T).trace(), rel=1e-4)
    assert got.metrics["kernel"] == pytest.approx(1000 * distances.kernel_distance(x, y, 3, 40, 5)[0], rel=1e-3)
    near = distances.neighborhoods(x[np.linspace(0, 149, 90).astype(int)], y, 2)
    assert {name: got.metrics[name] for name in near} == pytest.approx(near, abs=0.02)
    assert got.metrics["inception_score"] == pytest.approx(distances.inception_score(10 * y)[0], rel=1e-3)
    assert "fid" not in got.metrics
    assert got.protocol == (
        "generation extractor=means weights=ffffffff dimensions=3 resize=legacy pixels=16x16 real=train(150) fake=90 seed=5"
        " truncation=none generator=settled; k=2 against 90 real; kernel x 1000 over 3 subsets of 40;"
        " frechet in percent of the real variance"
    )


def test_fid_and_kid_are_reported_only_for_inception_2015(monkeypatch):
    monkeypatch.setattr(distances, "frechet", lambda real, fake: 7.0)  # which would take seconds
    monkeypatch.setattr(distances, "kernel_distance", lambda *_: (0.0, 0.0))
    real, fake = scene(0, 40), scene(1, 40)

    def encode(dim, images):
        return {"pooled": jnp.tile(images.astype(jnp.float32).mean((1, 2)), (1, 683))[:, :dim]}

    for name, dim, named in (("inception-2015-12-05", 2048, True), ("inception-2015-12-05", 3, False), ("inception-v3", 2048, False)):
        network = Extractor(name, dim, functools.partial(encode, dim))
        metrics = generation.evaluate(sample_context(real, fake, extractor=lambda *_, network=network: network), examples=40).metrics
        variance = dim / 3 * np.cov(real.mean((1, 2)).T).trace()
        assert metrics["frechet"] == pytest.approx(700 / variance, rel=2e-3)
        assert metrics.get("fid") == (7 if named else None)
        assert metrics.get("kid") == (metrics["kernel"] / 1000 if named else None)


def test_real_features_are_cached_for_a_run_and_samples_are_not():
    cache, real = {}, {"train": scene(0, 60), "test": scene(2, 60)}
    first, second = (sample_context(real, scene(1, 64), cache=cache) for _ in range(2))
    entries = {"a": dict(kind="generation", examples=64, subsets=2), "b": dict(kind="generation", examples=32, subsets=2, seed=3)}
    evals.run(entries, first)
    assert first.opened == [(64, 0, None), "train", (32, 3, None)]
    evals.run({"a": entries["a"], "t": dict(kind="generation", examples=32, split="test", truncation=0.5)}, second)
    assert second.opened == [(64, 0, None), (32, 0, 0.5), "test"]


def test_generation_on_one_and_eight_devices_gives_equal_metrics():
    real, fake = scene(0, 100), scene(1, 90, noise=25)
    brightness = jax.jit(lambda images: images.astype(jnp.float32).mean((1, 2, 3)))
    contexts = [sample_context(real, fake, mesh_of(n), discriminate=brightness) for n in (1, 8)]
    with jax.transfer_guard("disallow"):
        one, eight = (
            generation.evaluate(c, examples=90, subsets=2).metrics | discriminator_memorization.evaluate(c).metrics
            for c in contexts
        )
    assert one == pytest.approx(eight, rel=1e-4, abs=1e-6)


@pytest.mark.full
def test_metrics_get_worse_with_noise_and_with_missing_modes():
    """In random features Frechet and kernel distances rise with noise; recall and coverage fall with missing modes."""
    real = scene(0, 400, kinds=8)

    def measured(fake):
        return generation.evaluate(sample_context(real, fake), examples=400, subsets=5, subset_size=300).metrics

    same = measured(scene(1, 400, kinds=8))
    noisy = [measured(scene(2, 400, kinds=8, noise=noise)) for noise in (20, 40, 80)]
    missing = []
    for kept in (6, 4, 2):
        every = scene(3, 400 * 8 // kept + 8, kinds=8)
        missing.append(measured(every[: len(every) * kept // 8][:400]))
    for worse in (noisy, missing):
        for metric in ("frechet", "kernel"):
            values = [same[metric]] + [metrics[metric] for metrics in worse]
            assert (np.diff(values) > 0).all(), (metric, values)
    for metric in ("recall", "coverage"):
        values = [same[metric]] + [metrics[metric] for metrics in missing]
        assert (np.diff(values) < 0).all(), (metric, values)
    assert same["frechet"] < 2 and same["precision"] > 0.8 and same["recall"] > 0.8
    assert all(metrics["precision"] > 0.8 for metrics in missing)  # what is there is real


def test_larger_real_images_are_downsampled_and_smaller_ones_rejected():
    real, fake = scene(0, 64, size=32), scene(1, 64, size=16)
    reduced = np.asarray(to_size(real, (16, 16)))
    directly = generation.evaluate(sample_context(reduced, fake), examples=64, subsets=2)
    assert generation.evaluate(sample_context(real, fake), examples=64, subsets=2).metrics == pytest.approx(directly.metrics, rel=1e-4)
    with pytest.raises(UserError, match=r"samples are \(32, 32\) pixels and real images only \(16, 16\); enlarge"):
        generation.evaluate(sample_context(fake, real), examples=64)


def test_invalid_generation_evaluations_raise_one_line_errors():
    real, fake = scene(0, 40), scene(1, 40)
    entries = {"generation": dict(kind="generation", examples=40, subsets=1), "judge": dict(kind="discriminator_memorization")}
    assert evals.run(entries, pixel_context(lambda split: batches_of(real))) == {}  # raw pixels have no model
    neither = Context(lambda x: x, batches_of, model=EvaluatedModel(open_extractor, {}))
    with pytest.raises(UserError, match=r"evals\.generation: kind='generation' needs a method that gives samples, and this does not"):
        evals.run(entries, neither)
    with pytest.raises(UserError, match=r"evals\.judge: kind='discriminator_memorization' needs a method that gives discriminate"):
        evals.run({"judge": entries["judge"]}, neither)
    for wrong, message in (
        (dict(k=0), "k=0 must be at least 1"),
        (dict(examples=3), "examples=3 above k=3"),
        (dict(subsets=0), "subsets=0"),
        (dict(subset_size=1), "subset_size=1"),
        (dict(truncation=-1.0), "truncation=-1"),
        (dict(resize="nearest"), "'nearest'.*choose one of"),
        (dict(split="validation"), "'validation'.*choose one of"),
    ):
        with pytest.raises(UserError, match=message):
            evals.check({"generation": dict(kind="generation", **wrong)})
    with pytest.raises(UserError, match="examples=0"):
        evals.check({"judge": dict(kind="discriminator_memorization", examples=0)})
    with pytest.raises(UserError, match="the real split has 3 images, too few for k=3"):
        generation.evaluate(sample_context(real[:3], fake), examples=40, subsets=1)
    with pytest.raises(UserError, match="all real images have the same features"):
        generation.evaluate(sample_context(np.repeat(real[:1], 8, 0), fake), examples=40, subsets=1)


def test_random_conv_extractor_equals_golden_features():
    network = open_extractor("random_conv")
    features = np.asarray(network.encode(scene(0, 2))["pooled"])
    assert (network.name, network.dim, network.classes, network.sha256, features.shape) == ("random_conv", 64, 0, "", (2, 64))
    np.testing.assert_allclose(features[0, [1, 3]], [0.39094403, 0.20188949], rtol=1e-4)
    kernels = network.encode.args[0]
    assert [k.shape for k in kernels] == [(3, 3, 3, 32), (3, 3, 32, 64), (3, 3, 64, 64)]
    assert [float(np.std(k)) for k in kernels] == pytest.approx([np.sqrt(2 / (9 * n)) for n in (3, 32, 64)], rel=0.05)


# --- memorization of the discriminator


def test_discriminator_accuracy_counts_positive_scores_of_both_splits():
    real = {"train": scene(0, 40), "test": scene(1, 50)}
    brightness = lambda images: images.astype(jnp.float32).mean((1, 2, 3))  # noqa: E731
    levels = {split: images.astype(np.float64).mean((1, 2, 3)) for split, images in real.items()}
    zero = np.median(levels["train"][:30]) + 0.01
    context = sample_context(real, None, discriminate=jax.jit(lambda images: brightness(images) - zero))
    got = discriminator_memorization.evaluate(context, examples=30)
    train, test = (levels[split][:30] for split in ("train", "test"))
    assert got.metrics["accuracy_train"] == pytest.approx(100 * np.mean(train > zero))
    assert got.metrics["accuracy_test"] == pytest.approx(100 * np.mean(test > zero))
    assert got.metrics["train_above_test"] == pytest.approx(100 * np.mean(train[:, None] > test), abs=0.2)
    assert got.protocol.startswith("judge first of train(30) and test(30) ")


def test_above_counts_ties_as_half():
    a, b = np.array([1.0, 2, 2, 5]), np.array([2.0, 3, 0])
    expected = np.mean((a[:, None] > b) + 0.5 * (a[:, None] == b))
    assert discriminator_memorization.above(a, b) == pytest.approx(expected)
    assert discriminator_memorization.above(a, a) == 0.5


# --- contexts of runs


@pytest.fixture(scope="module")
def run():
    small = ("--config.evals.generation.examples=40", "--config.data.train_split=train[:96]", "--config.data.test_split=test[:64]")
    config = configs.load(f"{ROOT}/configs/gan.py:smoke", (*small, "--config.eval_batch_size=32"))
    experiment = build_experiment(config)
    return experiment, experiment.run.init()


@pytest.mark.full
def test_context_of_a_gan_run_has_samples_and_discriminator(run):
    experiment, state = run
    entries = {
        "generation": dict(kind="generation", examples=40, subsets=2),
        "judge": dict(kind="discriminator_memorization", examples=50),
    }
    results = evals.run(entries, model_context(experiment, state))
    metrics = results["generation"].metrics | results["judge"].metrics
    assert {"generation/frechet", "generation/recall", "judge/accuracy_train"} <= set(metrics)
    assert np.isfinite(list(metrics.values())).all()
    assert "real=scenes:train[:96]+upright+resize_crop-16-16(96) fake=40" in results["generation"].protocol
    repeated = evals.run(entries, model_context(experiment, state))
    assert repeated == results and len(experiment.cache) == 1


@pytest.mark.full
def test_missing_sampler_and_missing_weight_file_raise_before_training(run):
    experiment, state = run
    without = experiment._replace(sampler=None)
    with pytest.raises(UserError, match=r"evals\.generation: kind='generation' needs a method that gives samples"):
        evals.check_needs(without.config.evals, model_context(without, state))
    with experiment.config.unlocked():
        experiment.config.evals.generation.extractor = "inception:/nowhere"
    try:
        with pytest.raises(UserError, match="there is no file /nowhere"):
            evals.check_needs(experiment.config.evals, model_context(experiment, state))
    finally:
        experiment.config.evals.generation.extractor = "random_conv"


@pytest.mark.full
def test_exported_encoder_works_as_an_extractor(run, tmp_path):
    experiment, state = run[0], jax.device_get(run[1])
    source = export.make_source(experiment.config, state.params, state.mutable)
    about = {"step": 7, "total_steps": 9, "metrics": {}, "protocols": {}, "versions": {}}
    size, mesh = source.image_shape[0], mesh_of(8)
    images = scene(0, 16, size=size)
    expected = np.asarray(experiment.encode(state.params, state.mutable, images)["pooled"])
    export.write(tmp_path / "encoder", "stablehlo", source, about)  # the format with the most restrictions on devices and sizes
    network = open_extractor(str(tmp_path / "encoder"), mesh=mesh)
    assert (network.name, network.dim) == ("gan-step7", expected.shape[1])
    np.testing.assert_allclose(network.encode(images)["pooled"], expected, rtol=1e-3, atol=1e-4)
    assert network.encode(scene(0, 2, size=size + 9))["pooled"].shape == (2, expected.shape[1])
    with jax.transfer_guard("disallow"):
        metrics, protocol, _ = generation.evaluate(
            sample_context(scene(0, 40), scene(1, 40), mesh), extractor=str(tmp_path / "encoder"), examples=40, subsets=1
        )
    assert f"extractor=gan-step7 weights={network.sha256[:8]} " in protocol and f"resize=clean to {size}x{size} " in protocol
    assert "fid" not in metrics and np.isfinite(metrics["frechet"])
