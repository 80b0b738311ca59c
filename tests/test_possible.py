"""Which evaluations other people's data allow, decided before anything is compiled, and what a message says about the others."""

import pathlib
import re
import shlex

import numpy as np
import pytest
from small_data import labeled, photographs, picture_feature, png, prepare

from ssl_jax.engine.method import Spec
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.abstract import build_abstract
from ssl_jax.experiment.contexts import open_eval, split_names
from ssl_jax.experiment.possible import check_training_labels, impossible, labels_in_range, possible
from ssl_jax.experiment.training import load_config

ROOT = pathlib.Path(__file__).parent.parent


def warnings(caplog):
    """Beside them there is a line for each source that was opened."""
    return [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A TFDS directory with one dataset of each kind."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    classes = tfds.features.ClassLabel(num_classes=3)
    three = [i % 3 for i in range(24)]
    labeled(folder, "stl", classes, unlabelled=[-1] * 30, train=three, test=three)
    labeled(folder, "lists", tfds.features.Sequence(classes), train=[[0, 1]] * 6, test=[[2]] * 6)
    labeled(folder, "several", tfds.features.Sequence(tfds.features.ClassLabel(num_classes=2), length=3),
            train=[[1, 0, 1], [0, 1, 0]] * 12, test=[[1, 1, 0]] * 12)  # fmt: skip
    labeled(folder, "counts", tfds.features.Tensor(shape=(2,), dtype=np.int64), train=[[4, 0]] * 8, test=[[1, 1]] * 8)
    labeled(folder, "scores", tfds.features.Tensor(shape=(), dtype=np.float32), train=[0.1, 0.9] * 6, test=[0.1] * 6)
    labeled(folder, "names", tfds.features.Text(), train=["cat", "dog"] * 6, test=["cat"] * 6)
    labeled(folder, "one", classes, train=[1] * 24, test=three)
    labeled(folder, "some", classes, train=[*three, -1], test=three)
    labeled(folder, "hidden", classes, train=three, test=[-1] * 8)
    labeled(folder, "wide", tfds.features.Tensor(shape=(), dtype=np.int64), train=three, test=[*three, 5, 7])
    rows = [{"left": png(i), "right": png(i + 1), "label": i % 3} for i in range(24)]
    pair = {"left": picture_feature(), "right": picture_feature(), "label": classes}
    prepare(folder, "pair", pair, {"train": rows, "test": rows})
    return folder


def config_of(data, name, *more, split="train", recipe="simclr"):
    flags = (f"--config.data.name={name}", f"--config.data.data_dir={data}", f"--config.data.train_split={split}")
    return load_config(f"{ROOT}/configs/{recipe}.py:smoke", (*flags, "--config.data.test_split=test", *more))


UNUSABLE = {
    "lists": "'lists' has labels of int32 (?): a list whose length differs",
    "several": "'several' has several labels per example (int32 (3)); kind='linear' with solver='lbfgs' measures them",
    "counts": "'counts' has several labels per example (int32 (2)); kind='linear' with solver='lbfgs' measures them",
    "scores": "'scores' has labels of float32 (): no class",
    "names": "'names' has labels of object (): no class",
    "one": "'one:train' has one class only",
    "some": "'some:train' has examples without a label (label -1)",
    "hidden": "'hidden:test' has no labels (label -1)",
    "stl": "'stl:unlabelled' has no labels (label -1); --config.data.bank_split=train evaluates with the labels of that split",
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_evaluations_that_need_classes_are_left_out_without_them(data, name, caplog):
    config = config_of(data, name, split="unlabelled" if name == "stl" else "train")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.evals.shape = {"kind": "representation"}
    measured = possible(config)
    assert "knn" not in measured.evals
    assert "shape" in measured.evals
    assert measured.best_metric == ""
    (record,) = warnings(caplog)
    others = "evals.knn is left out: it needs" if name in ("several", "counts") else "evals.knn, evals.linear are left out: they need"
    assert f"{others} 'label', and {UNUSABLE[name]}" in record.getMessage()
    assert ("linear" in measured.evals) == (name == "several")  # its mean average precision
    assert "config.best_metric='knn/top1' is of these, so only the newest checkpoints are kept" in record.getMessage()
    batch = next(iter(open_eval(config, "train")))  # the images can still be read
    assert batch["image"].shape[1:] == (16, 16, 3)


def test_remedy_for_an_unlabeled_train_split_works_as_typed(data):
    """STL-10 and ImageNet-22k: train on the large unlabeled split, evaluate with the labeled one."""
    config = config_of(data, "stl", split="unlabelled")
    (flag,) = {re.search(r"--config\S+", reason).group() for reason in impossible(config, config.evals).values()}
    config = config_of(data, "stl", flag, split="unlabelled")
    assert possible(config) == (dict(config.evals.items()), "knn/top1")
    counts = {split: sum(int(b["_valid"].sum()) for b in open_eval(config, split)) for split in ("train", "bank", "test")}
    assert counts == {"train": 30, "bank": 24, "test": 24}
    assert split_names(config) == {"train": "stl:unlabelled", "bank": "stl:train", "test": "stl:test"}


def test_labels_of_any_form_are_left_alone_where_all_is_well(data):
    for name in ("pair", "wide"):
        config = config_of(data, name, "--config.data.features.image=left" if name == "pair" else "--config.seed=1")
        assert not impossible(config, config.evals)


def test_label_vectors_that_are_no_yes_or_no_are_named(data):
    config = config_of(data, "counts")
    assert impossible(config, config.evals)["linear"].endswith("has label vectors with 4; only 0 and 1 say which classes an image has")
    ridge = impossible(config_of(data, "several"), {"linear": {"kind": "linear", "solver": "ridge"}})
    assert "kind='linear' with solver='lbfgs' measures them" in ridge["linear"]


def test_classes_that_only_the_test_split_has_are_told(data, caplog):
    config = config_of(data, "wide")
    assert not impossible(config, config.evals)
    (record,) = warnings(caplog)
    assert "'wide:test' has 2 of 26 examples of classes that 'wide:train' lacks (5, 7)" in record.getMessage()


def test_dataset_without_an_image_names_the_flag_that_works(data):
    with pytest.raises(UserError) as raised:
        impossible(config_of(data, "pair"), {"knn": {"kind": "knn", "k": 3}})
    flags = re.findall(r"--config\.data\.features\.image=\w+", str(raised.value))
    assert [flag.rpartition("=")[2] for flag in flags] == ["left", "right"]
    for flag in flags:
        assert not impossible(config_of(data, "pair", flag), {"knn": {"kind": "knn", "k": 3}})


def test_more_neighbors_than_the_bank_has_is_refused_before_training(data):
    config = config_of(data, "stl", "--config.evals.knn.k=25")
    with pytest.raises(UserError) as raised:
        impossible(config, config.evals)
    assert "evals.knn.k=25 is too large for 'stl:train', which has 24 examples" in str(raised.value)
    flag = re.search(r"--config\S+", str(raised.value)).group()
    config = config_of(data, "stl", flag)
    assert not impossible(config, config.evals)


def test_split_that_does_not_exist_is_refused_before_training(data):
    config = config_of(data, "stl", "--config.data.test_split=validation")
    with pytest.raises(UserError, match="has no split 'validation'; it has test, train, unlabelled"):
        impossible(config, {"shape": {"kind": "representation"}})


def test_photographs_without_classes(tmp_path, caplog):
    """Every recipe for a folder: what needs labels is left out with one warning, and the rest stays."""
    folder = photographs(tmp_path / "photos")
    for recipe in ("gan.py:folder", "vae.py:beta_vae", "vqvae.py:smoke"):
        caplog.clear()
        config = load_config(f"{ROOT}/configs/{recipe}", (f"--config.data.name={folder}",)).copy_and_resolve_references()
        with config.unlocked():
            config.data.train_split, config.data.test_split = "train", "test"
        measured = possible(config)
        kept = [entry["kind"] for entry in measured.evals.values()]
        assert kept and not {"knn", "linear", "fewshot"} & set(kept), recipe
        assert len(warnings(caplog)) == 1, recipe
    config = load_config(f"{ROOT}/configs/gan.py:folder", (f"--config.data.name={folder}", "--config.evals.generation.k=30"))
    with pytest.raises(UserError, match=r"evals.generation.k=30 is too large .*; give --config.evals.generation.k=\d+ or less"):
        possible(config)


FACTS = dict(name="/nowhere/photos", examples=1000, image_shape=(64, 64, 3))


@pytest.mark.parametrize("name", ["biggan.py:smoke", "stylegan.py:smoke", "vq_prior.py:smoke", "maskgit.py:smoke"])
@pytest.mark.full
def test_remedy_for_a_conditional_model_without_labels_works_as_typed(name):
    import jax

    def build(*flags):
        config = load_config(f"{ROOT}/configs/{name}", flags).copy_and_resolve_references()
        with config.unlocked():
            config.data.update(FACTS)
        return build_abstract(config, jax.devices()[:1], "cpu")

    with pytest.raises(UserError, match="conditional needs labels that are classes") as raised:
        build("--config.model.conditional=True")
    flags = shlex.split(str(raised.value).partition("; give ")[2])
    assert build("--config.model.conditional=True", *flags).method


def test_method_that_learns_classes_is_refused_on_a_split_without_labels(data):
    from types import SimpleNamespace as N

    config = config_of(data, "stl", split="unlabelled").copy_and_resolve_references()
    experiment = N(config=config, method=N(inputs={"label": Spec(())}))
    with experiment.config.unlocked():
        experiment.config.data.num_classes = 3
    with pytest.raises(UserError, match=r"'stl:unlabelled' has no labels \(label -1\); give a labeled split with --config"):
        check_training_labels(experiment)
    with experiment.config.unlocked():
        experiment.config.data.train_split = "train"
    check_training_labels(experiment)


def test_labels_outside_of_the_classes_end_training_with_one_line():
    from types import SimpleNamespace as N

    data = N(name="x", train_split="train", num_classes=3)
    experiment = N(config=N(data=data), method=N(inputs={"label": Spec((), "int32")}))
    good = {"label": np.array([0, 2])}
    batches = labels_in_range([good, {"label": np.array([0, 3])}], experiment)
    assert next(batches) is good
    with pytest.raises(UserError, match="has label 3, and declares 3 classes, 0 to 2"):
        next(batches)
    experiment.method.inputs.pop("label")
    assert len(list(labels_in_range([{"label": np.array([-1])}], experiment))) == 1


def test_answers_outside_of_the_classes_end_training_with_one_line():
    from types import SimpleNamespace as N

    data = N(name="x", train_split="train", num_classes=None, vocabulary={"question": 9, "answer": 3})
    inputs = {"question": Spec((4,), "int32"), "answer": Spec((), "int32")}
    experiment, questions = N(config=N(data=data), method=N(inputs=inputs)), np.full((2, 4), 8)
    batches = labels_in_range([{"question": questions, "answer": np.array(x)} for x in ([0, 2], [0, -1])], experiment)
    next(batches)
    with pytest.raises(UserError, match=r"a training batch of 'x:train' has examples without a label \(label -1\) in 'answer'"):
        next(batches)


def test_texts_of_a_vocabulary_are_numbers_for_evaluations():
    flags = ("--config.data.name=scenes/tiny", "--config.data.train_split=train", "--config.data.test_split=test")
    config = load_config(f"{ROOT}/configs/vqa.py:smoke", flags)
    assert impossible(config, config.evals) == {}
    with config.unlocked():
        config.data.vocabulary = {"answer": None}
    assert impossible(config, config.evals) == {"vqa": "'question' as numbers, and 'scenes/tiny' has object ()"}


@pytest.mark.parametrize("count", [1, 3, "groups"])
def test_simclr_of_another_number_of_views_is_refused(count):
    import jax

    config = configs.load(f"{ROOT}/configs/simclr.py:smoke", ()).copy_and_resolve_references()
    with config.unlocked():
        views = config.views
        del config.views
        config.views = {"all": views} if count == "groups" else (views[0],) * count
    with pytest.raises(UserError, match=f"compares two views of an image, and config.views has {count}"):
        build_abstract(config, jax.devices()[:1], "cpu")


@pytest.mark.full
def test_random_crops_of_evaluations_are_refused_with_a_flag_that_works():
    import jax

    def build(*flags):
        config = configs.load(f"{ROOT}/configs/simclr.py:smoke", ()).copy_and_resolve_references()
        with config.unlocked():
            config.data.eval_ops = flags[0] if flags else (("random_resized_crop", {"size": 40}),)
        return build_abstract(config, jax.devices()[:1], "cpu")

    with pytest.raises(UserError, match=r"config.data.eval_ops: random_resized_crop is random") as raised:
        build()
    ops = shlex.split(str(raised.value).partition("; give ")[2])[0].partition("=")[2]
    assert ops == "[('resize_crop', dict(resize=40, crop=40))]"
    assert build(tuple(eval(ops))).method


def test_number_of_host_crops_is_that_of_the_views():
    import jax

    config = configs.load(f"{ROOT}/configs/simclr.py:smoke", ()).copy_and_resolve_references()
    with config.unlocked():
        config.data.ops = (("random_resized_crops", {"size": 40, "crops": 3}),)
        config.data.eval_ops = (("resize_crop", {"resize": 40, "crop": 40}),)
    with pytest.raises(UserError, match=r"random_resized_crops makes 3 crops for config.views of 2 views; give crops=2"):
        build_abstract(config, jax.devices()[:1], "cpu")
