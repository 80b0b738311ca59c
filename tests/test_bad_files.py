"""A table of damaged files of ours: (file, damage, verb) -> a part of the message and the exit code, or a line of the report."""

import importlib.util
import json
import os
import pathlib
import random
import shutil
import tarfile

import jax
import pytest

from launch import main
from ssl_jax.errors import UserError
from ssl_jax.experiment.config import from_plain, load, plain
from ssl_jax.experiment.vocabulary import open_vocabulary
from ssl_jax.experiment.workdir import read_config

pytestmark = pytest.mark.full

HERE = pathlib.Path(__file__).parent
DEEP = "[" * 200 + "]" * 200
JOB = {"engine": "slurm", "number": 1, "id": "7"}
ENTRY = {"subject": "trained", "step": 4, "metrics": {"knn/top1": 50.0}, "protocols": {"knn": "k=20"}}

DAMAGE = {
    "empty": b"",
    "cut": None,  # the first half of the file
    "binary": random.Random(0).randbytes(300),
    "text": b"hello\n",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "null": b"null",
    "number": b"7",
    "other type": None,  # a list in place of a dict, and the reverse
    "deep": DEEP.encode(),
    "very deep": b"[" * 100_000,
    "long number": b"9" * 10_000,
    "directory": None,
}
READERS = {
    "config.json": ("evaluate", "sample", "export"),
    "evaluations.json": ("evaluate", "export"),
    "provenance.json": ("export",),
    "job.json": ("status", "logs", "cancel"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with tarfile.open(HERE / "data" / "workdir_d65cb39.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    run = folder / "runs_of_d65cb39" / "simclr"
    (run / "provenance.json").write_text(json.dumps({"python": "3.11"}))
    (run / "starts.jsonl").write_text(json.dumps({"time/clock": 1.0}) + "\n")
    (run / "job.json").write_text(json.dumps(JOB))
    return folder / "runs_of_d65cb39"


@pytest.fixture
def run(runs):
    """The workdir of a run, which is as before after the test."""
    kept = runs / "kept"
    shutil.copytree(runs / "simclr", kept, symlinks=True)
    yield runs / "simclr"
    shutil.rmtree(runs / "simclr")
    kept.rename(runs / "simclr")


def damage(path, how):
    content = path.read_bytes()
    if how == "directory":
        path.unlink()
        path.mkdir()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "other type":
        path.write_text("{}" if content.lstrip().startswith(b"[") else "[]")
    else:
        path.write_bytes(DAMAGE[how])


def call(verb, workdir, capsys, *flags):
    """(exit code, the last line of stderr, stdout)."""
    capsys.readouterr()
    code = main([verb, f"--workdir={workdir}", *(["--step=4"] if verb in ("export", "evaluate", "sample") else []), *flags])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line]
    assert "Traceback" not in err
    return code, lines[-1] if lines else "", out


def refused(verb, workdir, capsys, *parts, flags=()):
    code, line, _ = call(verb, workdir, capsys, *flags)
    assert code == 2, line
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize(("name", "verb"), [(name, verb) for name, verbs in READERS.items() for verb in verbs])
def test_a_damaged_file_is_one_line(name, verb, how, run, capsys, monkeypatch):
    damage(run / name, how)
    if verb == "evaluate":
        monkeypatch.setattr("ssl_jax.experiment.evaluate.build_experiment", lambda *_, **__: None)
    if verb == "export":
        monkeypatch.setattr("ssl_jax.experiment.export_run.make_source", lambda *_: None)
    refused(verb, run, capsys, name)


CONFIG = {  # {key: value} of config.json -> a part of the message
    "no method": ({"method": None}, "it has null as 'method'"),
    "method": ({"method": 3}, "it has a number as 'method'"),
    "data": ({"data": []}, "it has a list as 'data'"),
    "model": ({"model": "x"}, "it has a text as 'model'"),
    "batch size": ({"batch_size": "x"}, "it has a text as 'batch_size'"),
    "true": ({"seed": True}, "it has true or false as 'seed'"),
    "total": ({"total": 3}, "total is 3"),
    "dtype": ({"dtype": [1]}, "dtype is [1]"),
    "evals": ({"evals": 3}, "evals is 3"),
    "mesh": ({"mesh": 3}, "mesh is 3"),
    "stages": ({"stages": "x"}, 'stages is "x"'),
    "references": ({"references": [1]}, "references is [1]"),
    "data name": ({"data": {"name": 3}}, "data.name is 3"),
    "split": ({"data": {"train_split": {}}}, "data.train_split is {}"),
    "ops": ({"data": {"ops": 3}}, "data.ops is 3"),
    "workers": ({"data": {"workers": "x"}}, 'data.workers is "x"'),
    "batch of 0": ({"batch_size": 0}, "batch_size is 0"),
    "optimizer": ({"optim": {"net": 3}}, "optim.* is 3"),
    "stage": ({"stages": {"a": 3}}, "stages.* is 3"),
    "mesh size": ({"mesh": {"data": "x"}}, 'mesh.* is "x"'),
    "encoder": ({"model": {"encoder": 3}}, "model.encoder is 3"),
    "op": ({"data": {"ops": [3]}}, "data.ops.* is 3"),
    "image shape": ({"data": {"image_shape": ["x"]}}, 'data.image_shape.* is "x"'),
    "rule": ({"sharding": [3]}, "sharding.* is 3"),
    "baseline": ({"baselines": [3]}, "baselines.* is 3"),
    "unknown method": ({"method": "nothing"}, "nothing"),
}


@pytest.mark.parametrize("name", CONFIG)
@pytest.mark.parametrize("verb", ["evaluate", "export", "sample"])
def test_a_wrong_entry_of_config_json_is_one_line(name, verb, run, capsys):
    change, part = CONFIG[name]
    values = json.loads((run / "config.json").read_text())
    data = {**values["data"], **change["data"]} if isinstance(change.get("data"), dict) else change.get("data", values["data"])
    (run / "config.json").write_text(json.dumps({**values, **change, "data": data}))
    refused(verb, run, capsys, part)


ENTRIES = {
    "no subject": ({"subject": None}, "entry 0 has null as 'subject'"),
    "step": ({"step": "4"}, "entry 0 has a text as 'step'"),
    "metrics": ({"metrics": [1]}, "entry 0 has a list as 'metrics'"),
    "metric": ({"metrics": {"knn/top1": "x"}}, "metrics of a wrong type"),
    "huge metric": ({"metrics": {"knn/top1": 10**400}}, "metrics of a wrong type"),
    "protocols": ({"protocols": 3}, "entry 0 has a number as 'protocols'"),
    "protocol": ({"protocols": {"knn": 3}}, "protocols of a wrong type"),
    "evals": ({"evals": 3}, "entry 0 has a number as 'evals'"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_wrong_entry_of_evaluations_json_is_one_line(name, run, capsys, monkeypatch):
    change, part = ENTRIES[name]
    (run / "evaluations.json").write_text(json.dumps([{**ENTRY, **change}]))
    monkeypatch.setattr("ssl_jax.experiment.export_run.make_source", lambda *_: None)
    refused("export", run, capsys, "evaluations.json is damaged (", part)


def test_evaluations_without_protocols_are_those_of_earlier_versions(run, capsys):
    (run / "evaluations.json").write_text(json.dumps([{"subject": "trained", "step": 4, "metrics": {"knn/top1": 50}}]))
    assert call("report", run, capsys)[0] == 0


REPORTED = ("config.json", "evaluations.json", "provenance.json", "metrics.jsonl", "starts.jsonl", "log.txt", "pictures/views.png")


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", REPORTED)
def test_report_says_what_is_damaged_and_never_fails(name, how, run, capsys):
    path = run / name
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        path.write_bytes(b"2025-01-01 10:00:00,124 WARNING something\n" * 2)
    damage(path, how)
    code, line, _ = call("report", run, capsys)
    assert code == 0, line
    page = (run / "report.html").read_text()
    if name not in ("starts.jsonl", "log.txt") and (name, how) != ("metrics.jsonl", "cut"):
        assert name in page


VALUES = [0, -1, 1e308, -1e308, 1e-320, 10**400, "x", None, True, [], {}, "\ud800", "\x1b[31m", float("nan"), float("inf")]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_report_of_odd_values(value, run, capsys):
    """Every entry of every file has this value in turn."""
    files = {name: json.loads((run / name).read_text()) for name in ("config.json", "evaluations.json", "provenance.json")}
    config = dict.fromkeys(files["config.json"], value) | {value if isinstance(value, str) else "a": value}
    entry = {**dict.fromkeys(ENTRY, value), "metrics": {"knn/top1": value, "a": value}}
    (run / "config.json").write_text(json.dumps({**config, "data": dict.fromkeys(files["config.json"]["data"], value)}))
    (run / "evaluations.json").write_text(json.dumps([entry, {**ENTRY, "metrics": entry["metrics"]}, {**ENTRY, "step": value}, value]))
    (run / "provenance.json").write_text(json.dumps({"devices": value, "packages": {"jax": value}}))
    line = {"step": 1, "ssl/loss": value, "time/seconds_per_step": value, "time/clock": value, "time/images_per_second": value}
    lines = [line, {**line, "step": value}, {**line, "step": 2, "ssl/loss": 0.0}, {**line, "step": 10**20}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "starts.jsonl").write_text(json.dumps({"time/clock": value}) + "\n")
    code, line, _ = call("report", run, capsys)
    assert code == 0, line
    assert "\x1b" not in (run / "report.html").read_text()


@pytest.mark.parametrize("how", ["empty", "cut", "binary", "null", "number", "other type", "deep", "very deep", "directory", "gone"])
@pytest.mark.parametrize("name", ["state/_METADATA", "checksums/metadata", "state/manifest.ocdbt", "_CHECKPOINT_METADATA"])
def test_a_damaged_checkpoint_is_one_line_or_is_intact(name, how, run, capsys, monkeypatch):
    """Orbax does without some of its files; what it reads then has the right checksums."""
    path = run / "checkpoints" / "4" / name
    if not path.is_file():
        pytest.skip(f"this version of Orbax writes no {name}")
    path.unlink() if how == "gone" else damage(path, how)
    monkeypatch.setattr("ssl_jax.experiment.export_run.make_source", lambda *_: (_ for _ in ()).throw(UserError("read")))
    code, line, _ = call("export", run, capsys)
    assert code == 2, line
    assert "checkpoints" in line or (name == "_CHECKPOINT_METADATA" and line == "error: read")


def test_a_workdir_that_is_a_file_or_has_a_file_as_checkpoints_is_one_line(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for verb in ("evaluate", "sample", "export", "report", "status", "logs", "cancel"):
        refused(verb, tmp_path / "file", capsys, "file")
        refused(verb, tmp_path / "nothing", capsys, "nothing")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("")
    refused("export", run, capsys, "checkpoints")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "7", "{}", '{"text": 3}', '{"text": {"tokens": "ab", "longest": 3}}', '{"text": {"tokens": [1], "longest": 3}}',
     '{"text": {"tokens": ["a"], "longest": "x"}}', '{"text": {"tokens": ["a"]}}', DEEP, "\x00\x01"],
    ids=range(11),
)  # fmt: skip
def test_a_damaged_vocabulary_is_one_line(content, tmp_path):
    (tmp_path / "vocabulary.json").write_text(content)
    with pytest.raises(UserError, match=r"vocabulary\.json|has no words"):
        open_vocabulary(from_plain({"data": {"vocabulary": {"text": None}}}), None, tmp_path)


@pytest.mark.parametrize("how", [how for how in DAMAGE if how != "directory"])
@pytest.mark.parametrize("name", ["card.json", "weights.safetensors"])
def test_a_damaged_export_is_one_line(name, how, runs, tmp_path):
    from ssl_jax import load
    from ssl_jax.export.card import CARD, seal

    folder = pathlib.Path(shutil.copytree(runs / "simclr" / "export" / "safetensors", tmp_path / "e"))
    card = json.loads((folder / CARD).read_text())
    damage(folder / name, how)
    if name != CARD:  # a consistent card: the checksum says that the file is as written
        seal(folder, {key: value for key, value in card.items() if key != "files"})
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", READERS)
def test_a_file_that_may_not_be_read_is_a_fault_of_the_machine(name, run, capsys):
    (run / name).chmod(0)
    assert call(READERS[name][0], run, capsys)[0] == 74
    assert call("report", run, capsys)[0] == 0


def test_the_table_has_over_a_hundred_rows():
    rows = len(DAMAGE) * (sum(map(len, READERS.values())) + len(REPORTED)) + 3 * len(CONFIG) + len(ENTRIES) + len(VALUES) + 40 + 22
    assert rows > 100
    assert jax.default_backend() == "cpu"


@pytest.mark.parametrize("path", sorted((HERE.parent / "configs").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_the_config_of_every_recipe_is_read_back(path, tmp_path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for variant in getattr(module, "VARIANTS", ()):
        config = plain(load(f"{path}:{variant.name}"))
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert plain(read_config(tmp_path)) == config
