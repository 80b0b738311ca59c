"""ssl_jax outside of its checkout: recipes, program names, and the wheel."""

import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

from launch import main
from ssl_jax import where
from ssl_jax.experiment import config as configs
from ssl_jax.launchers import supervise

ROOT = pathlib.Path(__file__).parent.parent


def test_a_recipe_is_found_from_any_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert configs.load("configs/simclr.py:smoke").method == "simclr"
    assert main(["configs", "simclr"]) == 0
    assert "cifar10" in capsys.readouterr().out
    assert main(["configs"]) == 0
    assert "simclr: " in capsys.readouterr().out
    assert main(["train", "--config=configs/simclrr.py", "--workdir=w"]) == 2
    assert "did you mean configs/simclr.py?" in capsys.readouterr().err


def test_a_config_of_the_user_comes_first_and_may_import_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    own = "from configs import supervised\n\n\ndef get_config(variant=''):\n    return supervised.get_config('smoke')\n"
    (tmp_path / "configs" / "simclr.py").write_text(own)
    assert where.find_config("configs/simclr.py") == pathlib.Path("configs/simclr.py")
    assert configs.load("configs/simclr.py").method == "supervised"
    assert where.find_config("configs/vae.py").is_absolute()


@pytest.mark.parametrize(
    ("argv", "name"),
    [("launch.py", "python launch.py"), ("/usr/bin/ssl_jax", "ssl_jax"), (f"{where.PACKAGE}/__main__.py", "python -m ssl_jax")],
)
def test_usage_help_and_errors_name_the_program_as_it_was_called(argv, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [argv])
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    shown = capsys.readouterr().out
    assert f"usage: {name} report" in shown and f"{name} report --workdir=runs/simclr" in shown
    assert main(["status", "--workdir=/nothing"]) == 2
    assert f"see `{name.removeprefix('python ') if argv == 'launch.py' else name} submit --help`" in capsys.readouterr().err


def test_processes_are_started_by_module_where_there_is_no_launch_py(tmp_path, monkeypatch):
    assert supervise.launch_command() == [sys.executable, str(ROOT / "launch.py")]
    monkeypatch.setattr(supervise, "LAUNCHER", tmp_path / "launch.py")
    assert supervise.launch_command() == [sys.executable, "-P", "-m", "ssl_jax"]


def test_the_package_declares_its_command_and_recipes():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert declared["project"]["scripts"] == {"ssl_jax": "ssl_jax.__main__:run"}
    done = subprocess.run(
        [sys.executable, "-c", "import setuptools; setuptools.setup = lambda **given: print(given); import setup"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if "No module named 'setuptools'" in done.stderr:
        pytest.skip("setuptools is not installed")
    assert "'package_dir': {'ssl_jax.recipes.configs': 'configs'}" in done.stdout, done.stderr
    assert "'ssl_jax.recipes.configs'" in done.stdout


@pytest.mark.full
def test_the_installed_wheel_works_without_the_checkout(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    probe = subprocess.run([sys.executable, "-c", "import setuptools, pip"], capture_output=True)
    if probe.returncode:
        pytest.skip("pip or setuptools is not installed")
    source, site, here = tmp_path / "source", tmp_path / "site", tmp_path / "here"
    source.mkdir()
    for name in ("ssl_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("requirements*.txt"), *map(ROOT.joinpath, ("setup.py", "pyproject.toml", "README.md", "LICENSE"))]:
        shutil.copy(path, source)
    here.mkdir()
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True, cwd=here)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    recipes = {path.name for path in (ROOT / "configs").glob("*.py")}
    assert {name.rpartition("/")[2] for name in names if name.startswith("ssl_jax/recipes/configs/")} == recipes
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True, cwd=here)

    def run(*command):
        environment = {**os.environ, "PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)

    where_is = run(sys.executable, "-c", "import ssl_jax; print(ssl_jax.__file__)").stdout
    assert where_is.startswith(str(site))
    for command in ([sys.executable, "-m", "ssl_jax"], [sys.executable, str(site / "bin" / "ssl_jax")]):
        done = run(*command, "configs", "simclr")
        assert done.returncode == 0 and "cifar10" in done.stdout, done.stderr
    flags = ["--config=configs/simclr.py:smoke", "--workdir=w", "--config.data.name=nothing"]
    refused = run(str(site / "bin" / "ssl_jax"), "train", *flags, "--processes=2")
    assert refused.returncode == 2 and "nothing" in refused.stderr and "Traceback" not in refused.stderr
