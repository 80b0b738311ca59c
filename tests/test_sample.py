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
    """The workdir of a finished run."""
    path = tmp_path_factory.mktemp("gan")
    assert main(["train", "--config=configs/gan.py:smoke", f"--workdir={path}"]) == 0
    return path


@pytest.mark.full
def test_run_saves_a_sample_grid_at_every_evaluation(workdir):
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
def test_sample_of_a_gan_is_reproducible(workdir, capsys, tmp_path):
    assert main(["sample", f"--workdir={workdir}", "--count=12"]) == 0
    written = {path.name for path in (workdir / "samples").iterdir()}
    assert written == {"grid.png", "truncation.png", "interpolation.png", "neighbors.png"}
    assert str(workdir / "samples" / "grid.png") in capsys.readouterr().out
    assert main(["sample", f"--workdir={workdir}", "--count=12", f"--output={tmp_path / 'second'}"]) == 0
    for name in written:
        assert (workdir / "samples" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.full
def test_sample_of_a_vae_writes_latent_traversals(tmp_path):
    assert main(["train", "--config=configs/vae.py:smoke", f"--workdir={tmp_path}", "--config.evals={}", "--config.best_metric="]) == 0
    assert main(["sample", f"--workdir={tmp_path}", "--count=12"]) == 0
    written = {path.name for path in (tmp_path / "samples").iterdir()}
    names = ("grid", "truncation", "interpolation", "reconstruction", "traversal", "neighbors")
    assert written == {f"{name}.png" for name in names}
    rows = np.asarray(Image.open(tmp_path / "samples" / "traversal.png"))
    assert rows.std(axis=(0, 1)).max() > 0


@pytest.mark.parametrize(("classes", "count", "shape"), [(10, 64, (10, 7)), (10, 40, (10, 4)), (100, 12, (12,)), (None, 12, (12,))])
def test_sample_grid_has_a_row_per_class(classes, count, shape):
    def latents(count, seed):  # sampled labels, which do not show the number of classes
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
def test_sample_of_a_conditional_stylegan(tmp_path):
    flags = ["--config.model.conditional=True", "--config.evals={}", "--config.best_metric="]
    assert main(["train", "--config=configs/stylegan.py:smoke", f"--workdir={tmp_path}", *flags]) == 0
    assert main(["sample", f"--workdir={tmp_path}", "--truncation=0.5"]) == 0
    assert {path.stem for path in (tmp_path / "samples").iterdir()} == {"grid", "truncation", "interpolation", "mixing", "neighbors"}


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--step=3"], "has no checkpoint 3"),
        (["--count=0"], "--count=0 must be at least 1"),
        (["--truncation=-1"], "must not be negative"),
        (["--acceptance=0"], "--acceptance=0 must be above 0"),
        (["--acceptance=0.5"], "--acceptance=0.5 needs samples of classes, and this model knows none; leave it out"),
        (["--extractor=/nowhere"], "extractor '/nowhere' is unknown"),
        (["--config.seed=1"], "is not understood"),
    ],
)
def test_sample_with_bad_input_is_one_line(workdir, flags, message, capsys):
    assert main(["sample", f"--workdir={workdir}", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.full
def test_spherical_interpolation_keeps_the_length_of_normal_latents():
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
    np.testing.assert_allclose(steps, jnp.broadcast_to(steps[:1], steps.shape), rtol=0.2)  # the ends have nearly equal lengths


def test_kind_of_latents_of_generative_configs():
    """StyleGAN's config has no kind: they are normal."""
    kinds = {name: sample_pages.kind_of_latents(load(f"configs/{name}.py:smoke", ())) for name in ("gan", "bigan", "stylegan")}
    assert kinds == {"gan": "normal", "bigan": "uniform", "stylegan": "normal"}
