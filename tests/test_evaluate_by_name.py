"""`launch.py evaluate` by name: parsing, checks, baselines, and every kind of evaluation with every method."""

import functools
import json
import logging
import pathlib
import tempfile

import numpy as np
import pytest
from PIL import Image

from launch import main
from ssl_jax.engine.checkpoint import Checkpoints, write_json
from ssl_jax.engine.method import ModelFns
from ssl_jax.errors import UserError
from ssl_jax.evals import evaluator, reference
from ssl_jax.evals import run as evals
from ssl_jax.evals.context import EvaluatedModel
from ssl_jax.experiment import config as configs
from ssl_jax.experiment import evaluate
from ssl_jax.experiment.baselines import baseline_context, initial_state
from ssl_jax.experiment.build import build_experiment
from ssl_jax.experiment.contexts import model_context
from ssl_jax.experiment.evaluations import comparable
from ssl_jax.experiment.training import load_config

ROOT = pathlib.Path(__file__).parent.parent
TINY = (
    "--config.data.train_split=train[:64]", "--config.data.test_split=test[:64]", "--config.eval_batch_size=32",
    "--config.batch_size=32", "--config.total=2 steps",
)  # fmt: skip
FEATURES = {"knn", "linear", "fewshot", "nonlinear", "representation"}  # of anything, raw pixels too
SMALLEST = {
    "affinity": dict(examples=8), "classifier": {}, "codebook": {}, "colors": dict(examples=32), "inpainting": dict(examples=32),
    "attentive": dict(learning_rates=(1e-3,), weight_decays=(0.0,), epochs=1, batch_size=32),
    "convolutional": dict(channels=8, epochs=1, batch_size=32), "detection": dict(examples=32),
    "nonlinear": dict(epochs=1, batch_size=32), "denoising": dict(components=4, examples=16),
    "discriminator_memorization": dict(examples=32),
    "disentanglement": dict(examples=64), "fewshot": dict(shots=(1,), seeds=(0,)),
    "generation": dict(examples=32, subsets=2, subset_size=16), "knn": dict(k=3), "likelihood": dict(k=2), "motion": dict(examples=32),
    "linear": dict(solver="ridge", l2=(1e-2,)), "linear_by_layer": dict(solver="ridge"), "pca_baseline": dict(examples=32),
    "perceptual_path": dict(examples=32), "pretext": dict(examples=32), "reconstruction": dict(examples=32, extractor="random_conv"),
    "representation": dict(examples=32), "sample_class_accuracy": dict(examples=32), "token_likelihood": dict(examples=32),
    "segmentation": dict(examples=32), "segmentation_linear": dict(examples=32, images=32, cells=500, l2=(1e-2,), iterations=10),
    "vqa": dict(examples=32, train_examples=64),
}  # fmt: skip
SUPPORT = {  # beside FEATURES
    "autoencoder": {
        "attentive", "convolutional", "denoising", "linear_by_layer", "disentanglement", "colors", "reconstruction", "pca_baseline",
    },
    **{
        name: {"attentive", "convolutional", "linear_by_layer"}
        for name in ("moco", "byol", "simsiam", "barlow_twins", "vicreg", "swav", "dino")
    },
    "ibot": {"attentive", "linear_by_layer"},
    "ijepa": {"attentive", "linear_by_layer"},
    "mae": {"attentive", "inpainting", "linear_by_layer"},
    "bigan": {
        "attentive", "convolutional", "denoising", "linear_by_layer", "generation", "discriminator_memorization", "colors",
        "reconstruction",
    },
    "bigbigan": {
        "attentive", "convolutional", "denoising", "linear_by_layer", "generation", "discriminator_memorization", "colors",
        "reconstruction",
    },
    "biggan": {"attentive", "convolutional", "sample_class_accuracy", "linear_by_layer", "generation", "discriminator_memorization"},
    "colorization": {"attentive", "convolutional", "denoising", "linear_by_layer", "colors", "reconstruction"},
    "context_encoder": {"attentive", "convolutional", "denoising", "inpainting", "linear_by_layer", "colors", "reconstruction"},
    "cooccurrence": {"affinity", "attentive", "convolutional", "linear_by_layer", "pretext"},
    "detection": {"attentive", "convolutional", "detection", "linear_by_layer"},
    "egomotion": {"attentive", "convolutional", "linear_by_layer", "motion", "pretext"},
    "equivariance": {"attentive", "convolutional", "linear_by_layer", "pretext"},
    "cpc": {"attentive", "convolutional", "linear_by_layer", "pretext"},
    "gan": {"attentive", "convolutional", "linear_by_layer", "generation", "discriminator_memorization"},
    "maskgit": {"sample_class_accuracy", "linear_by_layer", "generation"},
    "jigsaw": {"attentive", "convolutional", "linear_by_layer", "pretext"},
    "rbm_stack": {"denoising", "linear_by_layer", "disentanglement", "colors", "reconstruction", "pca_baseline"},
    "relative_patch": {"attentive", "convolutional", "linear_by_layer", "pretext"},
    "segmentation": {"attentive", "convolutional", "segmentation", "linear_by_layer"},
    "rotation": {"attentive", "convolutional", "linear_by_layer", "pretext"},
    "simclr": {"attentive", "convolutional", "linear_by_layer"},
    "split_brain": {"attentive", "convolutional", "denoising", "linear_by_layer", "colors", "reconstruction"},
    "ssgan": {"attentive", "convolutional", "linear_by_layer", "generation", "discriminator_memorization"},
    "stylegan": {"attentive", "linear_by_layer", "generation", "discriminator_memorization", "perceptual_path"},
    "supervised": {"attentive", "convolutional", "classifier", "linear_by_layer"},
    "vae": {
        "attentive", "convolutional", "denoising", "linear_by_layer", "disentanglement", "generation", "likelihood", "colors",
        "reconstruction", "pca_baseline",
    },
    "vit_vqgan": {"attentive", "codebook", "denoising", "linear_by_layer", "discriminator_memorization", "colors", "reconstruction"},
    "vq_prior": {"sample_class_accuracy", "linear_by_layer", "generation", "token_likelihood"},
    "vqa": {"attentive", "convolutional", "linear_by_layer", "vqa"},
    "vqvae": {"attentive", "convolutional", "codebook", "denoising", "linear_by_layer", "colors", "reconstruction"},
}  # fmt: skip
for offered in SUPPORT.values():  # both need the maps of 'layer2', which the same encoders have
    offered |= {"segmentation_linear"} if "convolutional" in offered else set()
SLOW = ("bigbigan", "biggan", "maskgit", "stylegan", "vit_vqgan")  # minutes each


# --- every kind of every method


@functools.cache
def untrained_stage(recipe):
    """The workdir of a run of `recipe` at step 0."""
    return save_run(configs.load(f"{ROOT}/{recipe}", TINY[:3]), pathlib.Path(tempfile.mkdtemp()), 0)


def save_run(config, workdir, step=2):
    """The workdir of a run of `config` with a checkpoint of `step`, whose weights are the initial ones."""
    experiment = build_experiment(config)
    saved = Checkpoints(workdir / "checkpoints")
    state = experiment.run.init()
    saved.save(state._replace(step=state.step + step), configs.plain(experiment.config))
    saved.close()
    write_json(workdir / "config.json", configs.plain(experiment.config))
    return str(workdir)


def load_tiny(name):
    config = configs.load(f"{ROOT}/configs/{name}.py:smoke", TINY)
    for stage in config.stages.values():
        stage.workdir = untrained_stage(stage.recipe)
    return config


def every_method(slow=()):
    """All methods: those in `slow` by hand, the others in `make test-all`."""
    marked = {name: pytest.mark.slow if name in slow else pytest.mark.full for name in sorted(SUPPORT)}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=mark) for name, mark in marked.items()])


@every_method()
def test_method_supports_the_evaluations_whose_functions_it_has(name):
    """`check_needs` works from shapes and compiles nothing."""
    experiment, offered = build_experiment(load_tiny(name)), set()
    context = model_context(experiment, experiment.run.abstract)
    for kind, options in SMALLEST.items():
        try:
            evals.check_needs({kind: {"kind": kind, **options}}, context)
            offered.add(kind)
        except UserError:
            pass
    assert offered == FEATURES | SUPPORT[name]


@every_method(SLOW)
def test_every_supported_kind_is_measured_with_its_baselines(name):
    experiment = build_experiment(load_tiny(name))
    spec = {kind: {"kind": kind, **SMALLEST[kind]} for kind in sorted(FEATURES | SUPPORT[name])}
    results = evals.run(spec, model_context(experiment, initial_state(experiment)))
    assert set(results) == set(spec)
    for kind, result in results.items():
        assert result.metrics and all(np.isfinite(value) for value in result.metrics.values()), kind
        assert "\n" not in result.protocol
    of_pixels = evals.run(spec, baseline_context(experiment, "raw pixels"))
    assert set(of_pixels) == set(evals.pixel_evals(spec)) == FEATURES
    comparison = [{"protocols": {kind: found[kind].protocol for kind in FEATURES}} for found in (results, of_pixels)]
    assert all(comparable(*comparison, f"{kind}/top1") for kind in FEATURES)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "pages"),
    [("rotation", ["pretext"]), ("egomotion", ["motion"]), ("cooccurrence", ["affinity"]), ("segmentation", ["segmentation"]),
     ("detection", ["detection"]), ("vqa", ["vqa"])],
)  # fmt: skip
def test_sample_writes_the_pictures_of_pretext_tasks_and_transfers(name, pages, tmp_path):
    workdir = save_run(load_tiny(name), tmp_path)
    assert main(["sample", f"--workdir={workdir}"]) == 0
    assert sorted(path.stem for path in (tmp_path / "samples").iterdir()) == pages
    assert all(len(np.unique(Image.open(path))) > 10 for path in (tmp_path / "samples").iterdir())


def test_every_method_is_in_the_table_of_supported_kinds():
    assert set(SUPPORT) == {path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "common")}


# --- parsing


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["knn"], {"knn": {"kind": "knn"}}),
        (["knn,k=200"], {"knn_k200": {"kind": "knn", "k": 200}}),  # the config has a 'knn' with other options
        (["knn,temperature=0.07,k=20"], {"knn": {"kind": "knn", "temperature": 0.07, "k": 20}}),  # the options of that 'knn'
        (["fewshot,shots=(1, 5)", "fewshot,shots=[2]"], {
            "fewshot": {"kind": "fewshot", "shots": (1, 5)}, "fewshot_shots-2": {"kind": "fewshot", "shots": [2]},
        }),
        (["linear,solver=ridge,l2=(1e-3,1e-2),label=ridge"], {"ridge": {"kind": "linear", "solver": "ridge", "l2": (1e-3, 1e-2)}}),
        (["generation,extractor=inception:/a b/c.pth@6726825d,truncation=None"], {
            "generation": {"kind": "generation", "extractor": "inception:/a b/c.pth@6726825d", "truncation": None},
        }),
        (["linear_by_layer,layers='block(1|2),x'"], {"linear_by_layer": {"kind": "linear_by_layer", "layers": "block(1|2),x"}}),
        ([" denoising , clip = False "], {"denoising": {"kind": "denoising", "clip": False}}),
        (["disentanglement,factors=('label',),model=trees"], {
            "disentanglement": {"kind": "disentanglement", "factors": ("label",), "model": "trees"},
        }),
        ([], {}),
    ],
)  # fmt: skip
def test_parse_evals_reads_kinds_and_options(texts, expected):
    assert evaluate.parse_evals(texts, {"knn": {"kind": "knn", "k": 20}}) == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["kn"], r"--eval=kn: kind='kn' is unknown \(did you mean 'knn'\?\); kinds: .*representation"),
        ([""], "kind='' is unknown"),
        (["knn,kk=3"], r"--eval=knn,kk=3: kk: unknown option \(did you mean 'k'\?\); options of 'knn': k, temperature, metric"),
        (["knn,k=0"], "--eval=knn,k=0: k=0 must be at least 1"),
        (["knn,k=2.5"], "k=2.5 must be a whole number"),
        (["knn,k=True"], "k=True must be a whole number"),
        (["knn,temperature=cold"], "temperature='cold' must be a number"),
        (["knn,metric=cosin"], r"metric='cosin' \(did you mean 'cosine'\?\); choose one of"),
        (["denoising,clip=no"], "clip='no' must be True or False"),
        (["linear_by_layer,layers=3"], "layers=3 must be a word"),
        (["fewshot,shots=5"], r"shots=5 must be a tuple, such as \(5,\)"),
        (["fewshot,shots=()"], r"shots=\(\) must not be empty"),
        (["fewshot,shots=(1,0)"], r"shots=\(1, 0\): each must be at least 1"),
        (["linear,l2=1e-3,1e-2"], "'1e-2' is not understood; give KIND,option=value"),
        (["linear,solver=ridge,epochs=3"], "'ridge' has no option 'epochs'; it has l2"),
        (["linear,validation=1.0"], "validation=1.0 must be above 0 and below 1"),
        (["linear,l2=(1e-3"], "a bracket is open"),
        (["linear_by_layer,layers='a"], "a quote is open"),
        (["knn,k=3,k=4"], "k is given twice"),
        (["knn,label=a/b"], "label=a/b names a file"),
        (["knn", "knn"], "there are two evaluations 'knn'; give one of them another label=NAME"),
        (["generation,examples=3"], "--eval=generation,examples=3: generation needs examples=3 above k=3"),
    ],
)
def test_parse_evals_refuses_bad_input_in_one_line(texts, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate.parse_evals(texts, {})
    assert "\n" not in str(error.value)


def test_parse_subjects_reads_trained_model_and_baselines():
    assert evaluate.parse_subjects(None) is None
    assert evaluate.parse_subjects('trained,untrained,"raw pixels"') == ["trained", "untrained", "raw pixels"]
    assert evaluate.parse_subjects("pixels, raw pixels") == ["raw pixels"]
    with pytest.raises(UserError, match="--subjects=trained,untraind: 'untraind' is unknown; did you mean 'untrained'"):
        evaluate.parse_subjects("trained,untraind")


def test_override_adds_an_evaluation_to_the_config():
    added = ("--config.evals.few.shots=(1,2)", "--config.evals.few.kind=fewshot")
    config = configs.load(f"{ROOT}/configs/simclr.py:smoke", (*added, "--config.evals.knn.metric=euclidean", "--config.evals.knn.k=5"))
    assert config.evals.few.to_dict() == {"kind": "fewshot", "shots": (1, 2)}
    assert (config.evals.knn.metric, config.evals.knn.k, config.is_locked) == ("euclidean", 5, True)
    evals.check(config.evals)
    for wrong, message in (
        ("--config.evals.kn.k=5", r"config.evals.kn; did you mean config.evals.knn\?; --config.evals.kn.kind=KIND adds one"),
        ("--config.evals.knn.kk=5", r"evals.knn.kk: unknown option \(did you mean 'k'\?\)"),
        ("--config.evals.new.kind=kn", r"evals.new.kind='kn' is unknown \(did you mean 'knn'\?\)"),
        ("--config.eval.new.kind=knn", "unknown key config.eval; did you mean config.evals"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(f"{ROOT}/configs/simclr.py:smoke", (wrong,))


# --- a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(load_tiny("simclr"), tmp_path_factory.mktemp("run"))


def entries(workdir):
    return json.loads(pathlib.Path(workdir, "evaluations.json").read_text())


@pytest.mark.full
def test_evaluate_measures_missing_baselines_of_a_new_evaluation(run, capsys):
    assert main(["evaluate", f"--workdir={run}", "--eval=knn,k=3", "--eval=knn,k=3,layer=projection,label=late"]) == 0
    table = capsys.readouterr().out
    assert all(word in table for word in ("trained, step 2", "untrained", "raw pixels", "knn_k3/top1", "late/top1"))
    found = {entry["subject"]: entry for entry in entries(run)}
    assert set(found) == {"trained", "untrained", "raw pixels"} and len(entries(run)) == 3
    assert found["trained"]["metrics"] == found["untrained"]["metrics"]  # the same seed, and no step was taken
    assert found["trained"]["step"] == 2 and found["untrained"]["step"] == 0
    assert found["trained"]["evals"]["knn_k3"] == evals.complete({"kind": "knn", "k": 3})
    assert set(found["raw pixels"]["protocols"]) == {"knn_k3"}  # pixels have no projection
    assert "nan" not in table and "-" not in next(line for line in table.splitlines() if "knn_k3/top1" in line)

    assert main(["evaluate", f"--workdir={run}", "--eval=knn,k=3"]) == 0  # the baselines are measured once
    assert sorted(entry["subject"] for entry in entries(run)) == ["raw pixels", "trained", "trained", "untrained"]
    assert "late/top1" not in capsys.readouterr().out
    assert main(["evaluate", f"--workdir={run}", "--eval=fewshot,shots=(1,)", "--subjects=untrained,pixels"]) == 0
    assert "trained, step" not in capsys.readouterr().out.replace("untrained", "").split("fewshot/1shot")[1].splitlines()[0]
    assert [entry["subject"] for entry in entries(run)][-2:] == ["untrained", "raw pixels"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval=knn,kk=3"], "kk: unknown option (did you mean 'k'?)"),
        (["--eval=knn", "--subjects=tained"], "'tained' is unknown; did you mean 'trained'?"),
        (["--eval=generation", "--subjects=pixels"], "generation need a model"),
    ],
)
def test_evaluate_refuses_bad_input_before_opening_data(run, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "build_experiment", lambda *_: pytest.fail("the data were opened"))
    assert main(["evaluate", f"--workdir={run}", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


@pytest.mark.full
def test_evaluation_that_the_method_does_not_support_is_named(run, capsys):
    assert main(["evaluate", f"--workdir={run}", "--eval=generation"]) == 2
    assert "kind='generation' needs a method that gives samples, and this does not" in capsys.readouterr().err


@pytest.mark.full
def test_evaluate_prints_what_it_cannot_save(run, capsys, monkeypatch):
    """A workdir of somebody else, or on a full disk."""
    before, lock = entries(run) if pathlib.Path(run, "evaluations.json").exists() else None, pathlib.Path(run, ".evaluations.lock")
    lock.unlink(missing_ok=True)
    lock.mkdir()  # open() fails, also for root
    try:
        assert main(["evaluate", f"--workdir={run}", "--eval=knn,k=5,label=five", "--subjects=trained,pixels"]) == 74
    finally:
        lock.rmdir()
    printed = capsys.readouterr()
    assert "five/top1" in printed.out and "raw pixels" in printed.out
    assert printed.err.splitlines()[-1].startswith("error: the numbers above are not saved: ")
    assert before is None or entries(run) == before


@pytest.mark.full
def test_resumed_finished_run_measures_a_new_evaluation(run, capsys):
    """Only the new evaluation runs, with baselines from the seed of the run."""
    flags = [f"--config={ROOT}/configs/simclr.py:smoke", f"--workdir={run}", *TINY, "--config.best_metric="]
    flags.append("--config.evals={'knn': {'kind': 'knn', 'k': 3}}")
    more = ["--config.evals.shape.kind=representation", "--config.evals.shape.examples=32"]
    assert main(["train", *flags]) == 0
    before = entries(run)
    assert main(["train", *flags, *more]) == 0
    new = entries(run)[len(before):]
    assert [(entry["subject"], entry["step"], list(entry["protocols"])) for entry in new] == [
        ("trained", 2, ["shape"]), ("raw pixels", 0, ["shape"]), ("untrained", 0, ["shape"]),
    ]  # fmt: skip
    assert new[0]["metrics"]["shape/rankme"] == new[2]["metrics"]["shape/rankme"]
    last = json.loads(pathlib.Path(run, "metrics.jsonl").read_text().splitlines()[-1])
    assert {"knn/top1", "shape/rankme"} <= set(last)
    assert main(["train", *flags, *more]) == 0  # nothing is left to measure
    assert len(entries(run)) == len(before) + 3
    assert "shape/rankme" in capsys.readouterr().out


@pytest.mark.full
def test_evaluations_that_need_labels_are_left_out_without_labels(tmp_path, caplog):
    for i in range(80):
        pixels = np.random.default_rng(i).integers(0, 256, (48, 48, 3), np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    config = configs.load(f"{ROOT}/configs/simclr.py:smoke", (*TINY[2:], f"--config.data.name={tmp_path / 'images'}"))
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.train_split, config.data.test_split = "train", "test"
        config.data.ops = config.data.eval_ops = (("resize_crop", dict(resize=48, crop=48)),)
        config.evals = dict(knn=dict(kind="knn", k=3), shape=dict(kind="representation", examples=8))
    workdir = save_run(config, tmp_path / "run")
    caplog.set_level(logging.WARNING)
    assert main(["evaluate", f"--workdir={workdir}"]) == 0
    warnings = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    (warning,) = warnings
    folder = str(tmp_path / "images")
    assert warning.startswith(f"evals.knn is left out: it needs 'label', and {folder!r} has only image; config.best_metric")
    assert all(list(entry["protocols"]) == ["shape"] for entry in entries(workdir)) and len(entries(workdir)) == 3
    assert main(["evaluate", f"--workdir={workdir}", "--eval=knn"]) == 2


# --- the records


@pytest.mark.parametrize("kind", sorted(SMALLEST))
def test_evaluator_record_documents_all_of_its_options(kind):
    record = evals.find(kind)
    assert list(evaluator.defaults(record)) == list(record.options)
    assert set(record.needs) <= {"model", *EvaluatedModel._fields, *ModelFns._fields}
    evals.check({"one": {"kind": kind, **evaluator.defaults(record)}})  # defaults are in their own ranges
    section = reference.section(kind)
    assert all(f"| `{name}` |" in section and option.meaning.replace("|", "\\|") in section for name, option in record.options.items())
    assert "**Metrics.**" in section


def test_every_kind_has_an_evaluator_record():
    assert evals.kinds() == sorted(SMALLEST)
