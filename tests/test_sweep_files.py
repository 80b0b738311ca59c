"""The studies in sweeps/: every file is a sweep, and every one of its configs loads."""

import pathlib

import pytest

from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.experiment import sweep as sweeps
from sweeps import families

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(path.name for path in (ROOT / "sweeps").glob("*.py"))


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # configs of a study are relative paths


@pytest.mark.parametrize("name", FILES)
def test_every_config_of_a_study_loads(name):
    sweep = sweeps.read_file(f"sweeps/{name}")
    sweeps.check(sweep)
    assert len(sweep.seeds) >= 3
    for variation in sweep.variations:
        overrides = [f"--config.{key}={sweeps.written(value)}" for key, value in {**sweep.common, **variation.overrides}.items()]
        configs.load(variation.config, overrides)


@pytest.mark.parametrize("block", list(families.BLOCKS))
def test_families_of_a_block_have_the_same_images_and_evaluations(block):
    loaded = {name: families.get_config(block + name) for name in families.BLOCKS[block]}
    assert len({config.total for config in loaded.values()}) == 1
    assert len({config.data.name for config in loaded.values()}) == 1
    assert len({str({k: v for k, v in config.evals.to_dict().items() if k != "pretext"}) for config in loaded.values()}) == 1
    encoders = {name: config.model.encoder for name, config in loaded.items() if "encoder" in config.model}
    wanted = {"name": "vit", "variant": "mini/6"} if block == "vit_" else {"name": "resnet", "depth": 10, "width": 0.25}
    for name, encoder in encoders.items():
        if name not in ("split_brain", "cpc", "bigbigan"):  # said in the docstring of the study
            assert {key: encoder[key] for key in wanted} == wanted, name


def test_an_unknown_family_is_one_line():
    with pytest.raises(UserError, match="'jigsw' does not exist; there are supervised"):
        families.get_config("jigsw")
