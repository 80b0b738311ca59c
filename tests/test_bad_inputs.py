"""Every bad input of `bad_inputs` is one line with its cause and exit code 2, and leaves nothing behind."""

import json
import logging
import pathlib

import pytest
from bad_inputs import ARGUMENTS, FILES, OVERRIDES
from PIL import Image

from launch import main
from ssl_jax.experiment import config as configs

ROOT = pathlib.Path(__file__).parent.parent
ROWS = [(["train", f"--config=configs/{name}.py:smoke", "--workdir={w}", f"--config.{override}"], cause)
        for name, override, cause in OVERRIDES] + ARGUMENTS  # fmt: skip
MAY_EXIST = {".lock", "log.txt"}  # of a workdir that could not start


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """{placeholder of a row: path}"""
    top = tmp_path_factory.mktemp("places")
    for name in ("mine/configs", "run", "sweep", "folder"):
        (top / name).mkdir(parents=True)
    for name, text in FILES.items():
        if text is not None:
            (top / "mine" / "configs" / f"{name}.py").write_text(text)
    (top / "file").write_text("no directory\n")
    config = configs.load(str(ROOT / "configs" / "simclr.py:smoke"))
    (top / "run" / "config.json").write_text(json.dumps(configs.plain(config)))
    variation = {"name": "gan:smoke", "config": "configs/gan.py:smoke", "overrides": ["--config.batch_size=16"], "keys": {}}
    runs = [{"name": "gan:smoke", "seed": 0, "workdir": "gan-smoke/seed-0"}]
    plan = {"version": 1, "name": "a", "baseline": None, "seeds": [0], "variations": [variation], "runs": runs}
    (top / "sweep" / "sweep.json").write_text(json.dumps(plan))
    for split in ("train", "test"):
        for name in ("a", "b"):
            (top / "images" / split / name).mkdir(parents=True)
            for number in range(20):
                Image.new("RGB", (32, 32), (number, 0, 0)).save(top / "images" / split / name / f"{number}.png")
    return {"mine": top / "mine" / "configs", **{name: top / name for name in ("run", "sweep", "images", "folder", "file")}}


def filled(text, places):
    for name, path in places.items():
        text = text.replace(f"{{{name}}}", str(path))
    return text


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} if folder.exists() else set()


@pytest.mark.parametrize("row", range(len(ROWS)), ids=[" ".join(argv)[:90] for argv, _ in ROWS])
def test_bad_input_is_one_line_with_its_cause(row, places, tmp_path, capsys, monkeypatch):
    argv, cause = ROWS[row]
    monkeypatch.chdir(ROOT)
    places = {**places, "w": tmp_path / "w"}
    before, handlers = [files(places[name]) for name in ("run", "sweep")], list(logging.getLogger("ssl_jax").handlers)
    code = main([filled(argument, places) for argument in argv])
    for handler in set(logging.getLogger("ssl_jax").handlers) - set(handlers):  # log.txt of the workdir
        logging.getLogger("ssl_jax").removeHandler(handler)
        handler.close()
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert (code, len(lines)) == (2, 1), printed.err
    assert lines[0].startswith("error: ")
    assert filled(cause, places) in lines[0]
    assert printed.out == ""
    assert files(places["w"]) <= MAY_EXIST
    assert [files(places[name]) for name in ("run", "sweep")] == before


def test_the_table_is_large_and_diverse():
    assert len(ROWS) >= 250
    assert len({name for name, *_ in OVERRIDES}) == len(list((ROOT / "configs").glob("*.py"))) - 2
    assert len({tuple(argv) for argv, _ in ROWS}) == len(ROWS)
