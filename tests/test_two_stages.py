"""A tokenizer and a prior over its codes by the command line: training, samples, features, exports, and bad input."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from launch import main
from ssl_jax import load
from ssl_jax.errors import UserError

TOKENIZER = "--config.stages.tokenizer.workdir="
EVALUATE_ONCE = ("--config.evaluate_every=8 steps", "--config.baselines=()")  # at the end


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens")
    evals = "--config.evals={'reconstruction': {'kind': 'reconstruction'}, 'codebook': {'kind': 'codebook'}}"
    assert main(["train", "--config=configs/vit_vqgan.py:smoke", f"--workdir={path}", *EVALUATE_ONCE, evals]) == 0
    return path


@pytest.fixture(scope="module")
def prior(tokens, tmp_path_factory):
    path = tmp_path_factory.mktemp("prior")
    evals = "--config.evals={'prior': {'kind': 'token_likelihood', 'examples': 128}, 'layers': {'kind': 'linear_by_layer'}}"
    flags = ["--config=configs/vq_prior.py:smoke", f"{TOKENIZER}{tokens}", f"--workdir={path}"]
    assert main(["train", *flags, *EVALUATE_ONCE, evals]) == 0
    return path


@pytest.mark.full
def test_config_of_a_prior_records_its_tokenizer(tokens, prior):
    stage = json.loads((prior / "config.json").read_text())["stages"]["tokenizer"]
    assert stage["config"] == json.loads((tokens / "config.json").read_text())
    assert (stage["step"], stage["workdir"]) == (8, str(tokens))
    entries = json.loads((prior / "evaluations.json").read_text())
    assert all("[tokenizer: trained with perceptual=" in protocol for entry in entries for protocol in entry["protocols"].values())
    assert {path.name for path in (tokens / "pictures").glob("codebook_*")} == {f"codebook_{step:08d}.png" for step in (8,)}
    metrics = entries[-1]["metrics"]
    assert metrics["prior/bits_per_token"] > 0
    assert any(name.startswith("layers/") for name in metrics)


@pytest.mark.full
def test_sample_of_a_tokenizer_writes_reconstructions(tokens):
    assert main(["sample", f"--workdir={tokens}"]) == 0
    assert [path.name for path in (tokens / "samples").iterdir()] == ["reconstruction.png"]


@pytest.mark.full
def test_sample_of_a_prior_writes_grid_completion_and_neighbors(prior, tmp_path):
    assert main(["sample", f"--workdir={prior}", "--count=12"]) == 0
    written = {path.name for path in (prior / "samples").iterdir()}
    assert written == {"grid.png", "completion.png", "neighbors.png"}
    assert np.asarray(Image.open(prior / "samples" / "completion.png")).std() > 0
    preferred = tmp_path / "preferred"
    assert main(["sample", f"--workdir={prior}", "--count=12", "--acceptance=0.5", f"--output={preferred}"]) == 0
    folders = (prior / "samples", preferred)
    first, second = ({path.name: np.asarray(Image.open(path)) for path in folder.iterdir()} for folder in folders)
    assert first["grid.png"].shape == second["grid.png"].shape
    assert {name for name in first if not np.array_equal(first[name], second[name])} == {"grid.png"}


@pytest.mark.full
def test_export_of_a_prior_includes_its_tokenizer(prior, tokens, tmp_path):
    folder, hidden = tmp_path / "export", tokens.with_name("hidden")
    assert main(["export", f"--workdir={prior}", "--format=orbax", f"--output={folder}"]) == 0
    shutil.move(tokens, hidden)
    try:
        images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
        features = load(folder / "orbax")(images)["pooled"]
    finally:
        shutil.move(hidden, tokens)
    assert np.isfinite(features).all()


@pytest.mark.full
@pytest.mark.parametrize("form", ["orbax", "stablehlo"])
def test_exported_tokenizer_encodes_and_decodes(form, tokens, prior, tmp_path):
    folder = tmp_path / "export"
    assert main(["export", f"--workdir={tokens}", f"--format={form}", f"--output={folder}"]) == 0
    tokenizer = load(folder / form)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    found = tokenizer.tokens(images)
    assert (found.dtype, found.ndim, len(found)) == (np.int32, 3, 3)
    pictures = np.asarray(tokenizer.decode(found))
    assert pictures.shape == images.shape
    assert 0 <= pictures.min() < pictures.max() <= 1
    assert np.mean(np.asarray(tokenizer.tokens(images[:1])) == np.asarray(found[:1])) > 0.9
    folder = tmp_path / "prior"
    assert main(["export", f"--workdir={prior}", f"--format={form}", f"--output={folder}"]) == 0
    with pytest.raises(UserError, match="has no function 'tokens'; export a tokenizer"):
        load(folder / form).tokens(images)


@pytest.mark.full
def test_changed_missing_or_incompatible_tokenizer_is_one_line(tokens, prior, tmp_path, capsys):
    def refused(*flags, workdir=tmp_path / "new"):
        assert main(["train", "--config=configs/vq_prior.py:smoke", f"--workdir={workdir}", *flags]) == 2
        message = capsys.readouterr().err.strip()
        assert "\n" not in message.removeprefix("error: ").strip()
        return message

    assert "--config.stages.tokenizer.workdir=DIR" in refused()
    assert "holds no run" in refused(f"{TOKENIZER}{tmp_path}")
    sized = "(('resize_crop', {'resize': 48, 'crop': 48}),)"
    assert "pixels" in refused(f"{TOKENIZER}{tokens}", f"--config.data.ops={sized}", f"--config.data.eval_ops={sized}")
    other = tmp_path / "other"
    shutil.copytree(tokens, other)
    shutil.rmtree(other / "checkpoints" / "8")
    assert "other weights" in refused(f"{TOKENIZER}{other}", workdir=prior) or "started with another config" in refused(
        f"{TOKENIZER}{other}", workdir=prior
    )
