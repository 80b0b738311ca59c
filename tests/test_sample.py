"""What `launch.py sample` writes, from a run of the smallest GAN."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from launch import main
from ssl_jax.engine.records import read_metrics
from ssl_jax.experiment import sample_pages
from ssl_jax.experiment.config import load
from ssl_jax.experiment.sampler import OpenSampler


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished run; its training is a test of its own."""
    path = tmp_path_factory.mktemp("gan")
    assert main(["train", "--config=configs/gan.py:smoke", f"--workdir={path}"]) == 0
    return path


@pytest.mark.full
def test_a_run_has_a_grid_at_every_evaluation_and_its_report_shows_them(workdir):
    grids = sorted(path.name for path in (workdir / "pictures").glob("samples_*.png"))
    assert grids == [f"samples_{step:08d}.png" for step in (0, 4, 8)]
    first, *_, last = (np.asarray(Image.open(workdir / "pictures" / name)) for name in grids)
    assert first.shape == last.shape
    assert not np.array_equal(first, last)
    entries = json.loads((workdir / "evaluations.json").read_text())
    assert {name.partition("/")[0] for entry in entries for name in entry["metrics"]} == {"generation", "judge", "knn", "linear"}
    logged = [line for line in read_metrics(workdir) if "spectral_norm/generator" in line]
    assert [line["step"] for line in logged] == [4, 8]
    page = (workdir / "report.html").read_text()
    assert all(f'alt="step {step}"' in page for step in (0, 4, 8))


@pytest.mark.full
def test_sample_writes_its_pages_and_repeats_them(workdir, capsys, tmp_path):
    assert main(["sample", f"--workdir={workdir}", "--count=12"]) == 0
    written = {path.name for path in (workdir / "samples").iterdir()}
    assert written == {"grid.png", "truncation.png", "interpolation.png", "neighbors.png"}
    assert str(workdir / "samples" / "grid.png") in capsys.readouterr().out
    assert main(["sample", f"--workdir={workdir}", "--count=12", f"--output={tmp_path / 'again'}"]) == 0
    for name in written:
        assert (workdir / "samples" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.full
def test_a_variational_autoencoder_shows_its_latents(tmp_path):
    assert main(["train", "--config=configs/vae.py:smoke", f"--workdir={tmp_path}", "--config.evals={}", "--config.best_metric="]) == 0
    assert main(["sample", f"--workdir={tmp_path}", "--count=12"]) == 0
    written = {path.name for path in (tmp_path / "samples").iterdir()}
    names = ("grid", "truncation", "interpolation", "reconstruction", "traversal", "neighbors")
    assert written == {f"{name}.png" for name in names}
    rows = np.asarray(Image.open(tmp_path / "samples" / "traversal.png"))
    assert rows.std(axis=(0, 1)).max() > 0


@pytest.mark.parametrize(("classes", "count", "shape"), [(10, 64, (10, 7)), (10, 40, (10, 4)), (100, 12, (12,)), (None, 12, (12,))])
def test_the_grid_has_a_row_for_each_class(classes, count, shape):
    def latents(count, seed):  # the labels that were drawn say nothing of how many classes there are
        return {"z": jnp.arange(count)} | ({"label": jnp.zeros(count, jnp.int32)} if classes else {})

    def pictures(latents, truncation):
        return np.broadcast_to(np.asarray(latents.get("label", latents["z"]))[:, None, None, None], (len(latents["z"]), 2, 2, 3))

    page = sample_pages.grid(OpenSampler(None, latents, pictures, None), classes, count, 0, None)
    assert page.shape == (*shape, 2, 2, 3)
    if len(shape) == 2:
        np.testing.assert_array_equal(page[:, :, 0, 0, 0], np.broadcast_to(np.arange(classes)[:, None], shape))
    elif classes:
        assert (np.diff(page[:, 0, 0, 0]) > 0).all()


@pytest.mark.full
def test_sample_shows_styles_and_classes(tmp_path):
    flags = ["--config.model.conditional=True", "--config.evals={}", "--config.best_metric="]
    assert main(["train", "--config=configs/stylegan.py:smoke", f"--workdir={tmp_path}", *flags]) == 0
    assert main(["sample", f"--workdir={tmp_path}", "--truncation=0.5"]) == 0
    assert {path.stem for path in (tmp_path / "samples").iterdir()} == {"grid", "truncation", "interpolation", "mixing", "neighbors"}


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--step=3"], "has no checkpoint 3"),
        (["--count=0"], "--count=0 must be at least 1"),
        (["--truncation=-1"], "must not be negative"),
        (["--acceptance=0"], "--acceptance=0.0 must be above 0 and at most 1"),
        (["--acceptance=0.5"], "--acceptance=0.5 needs samples of classes, and this model knows none; leave it out"),
        (["--extractor=/nowhere"], "extractor '/nowhere' is unknown"),
        (["--config.seed=1"], "is not understood"),
    ],
)
def test_mistakes_are_one_line(workdir, flags, told, capsys):
    assert main(["sample", f"--workdir={workdir}", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert told in error


def test_the_way_between_normal_latents_keeps_their_length():
    a, b = jax.random.normal(jax.random.key(0), (2, 5, 512))
    t = jnp.linspace(0, 1, 7)[:, None, None]
    arc, line = sample_pages.spherical(a, b, t), sample_pages.linear(a, b, t)
    np.testing.assert_allclose(arc[0], a, atol=1e-4)
    np.testing.assert_allclose(arc[-1], b, atol=1e-4)
    lengths = jnp.linalg.norm(arc, axis=-1)
    assert lengths.min() > 0.9 * 512**0.5
    assert jnp.linalg.norm(line[3], axis=-1).max() < 0.85 * 512**0.5
    unit = arc / lengths[..., None]
    steps = jnp.arccos(jnp.clip(jnp.sum(unit[1:] * unit[:-1], -1), -1, 1))
    np.testing.assert_allclose(steps, jnp.broadcast_to(steps[:1], steps.shape), rtol=0.2)  # even, if the ends were equally long


def test_every_generative_config_says_how_its_latents_are_drawn():
    """StyleGAN's config has no kind: they are normal."""
    kinds = {name: sample_pages.kind_of_latents(load(f"configs/{name}.py:smoke", ())) for name in ("gan", "bigan", "stylegan")}
    assert kinds == {"gan": "normal", "bigan": "uniform", "stylegan": "normal"}
