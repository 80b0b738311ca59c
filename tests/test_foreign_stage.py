"""A file of weights as a stage, as a warm start and in `evaluate`: the encoder of the file, and one line for what does not fit."""

import io
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from test_foreign_weights import SPEC, features, state_of

from configs import common
from launch import main
from ssl_jax.augment.pixels import to_input
from ssl_jax.data.sources import open_source
from ssl_jax.engine.backbone import open_backbone
from ssl_jax.engine.method import Stage
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.abstract import abstract_stages
from ssl_jax.experiment.baselines import initial_state
from ssl_jax.experiment.build import build_experiment
from ssl_jax.experiment.overrides import apply_overrides
from ssl_jax.experiment.stages import open_stages
from ssl_jax.methods import build_method
from ssl_jax.models.pretrained.foreign import read_encoder

ROOT = pathlib.Path(__file__).parent.parent
RECIPE = "configs/supervised.py:smoke"
RESNET = {"name": "resnet", "depth": 18}
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """{'vit': file, 'resnet': file}"""
    top = tmp_path_factory.mktemp("weights")
    state = state_of(RESNET)
    positive = {name: abs(value) + 1 if name.endswith("running_var") else value for name, value in state.items()}
    for name, state in (("vit", state_of(SPEC)), ("resnet", positive)):
        save_file(state, top / f"{name}.safetensors")
    return {name: str(top / f"{name}.safetensors") for name in ("vit", "resnet")}


def task(mode, **fields):
    """A config with a stage 'backbone'."""
    config = configs.load(RECIPE, ["--config.dtype=float32", "--config.batch_size=16"])
    with config.unlocked():
        config.stages.backbone = common.backbone(RECIPE)
        config.model.backbone = mode
    return apply_overrides(config, [f"--config.stages.backbone.{name}={value}" for name, value in fields.items()])


def opened(config):
    """(the config with its stage, the backbone, its weights)."""
    config, frozen = open_stages(config)
    own = config.stages.backbone.config
    return config, open_backbone(config, {"backbone": Stage(own, build_method(own))}), frozen


def encoded(path, images=IMAGES):
    found = read_encoder(path)
    return features(found, to_input(images, found.mean, found.std))


@pytest.mark.full
@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("mode", ["frozen", "trained"])
def test_a_backbone_from_a_file_gives_the_features_of_its_encoder(kind, mode, weights):
    config, backbone, frozen = opened(task(mode, weights=weights[kind]))
    net, stats = backbone.init(frozen)
    assert bool(net) == (mode == "trained")
    layers, _ = jax.jit(lambda *args: backbone.read(*args, frozen, IMAGES, False))(net, stats)
    wanted = encoded(weights[kind])
    assert set(layers) == set(wanted)
    for name, value in layers.items():
        np.testing.assert_allclose(value, wanted[name], atol=2e-4 * max(1, np.abs(wanted[name]).max()), err_msg=name)
    stage = config.stages.backbone
    assert (stage.config.method, stage.config.model.encoder.name, len(stage.fingerprint)) == ("pretrained", kind, 16)


def test_a_stage_from_a_file_is_part_of_the_config_and_other_weights_are_refused(weights, tmp_path):
    config, _, _ = opened(task("frozen", weights=weights["vit"]))
    again = configs.from_plain(configs.plain(config))
    build_method(again.stages.backbone.config)
    assert configs.differences(configs.plain(config), configs.plain(open_stages(again)[0])) == []
    moved = configs.plain(config)
    moved["stages"]["backbone"]["weights"] = "elsewhere.safetensors"
    assert configs.differences(configs.plain(config), moved) == []
    other = {name: value + 1 for name, value in state_of(SPEC).items()}
    save_file(other, tmp_path / "other.safetensors")
    with again.unlocked():
        again.stages.backbone.weights = str(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"stages\.backbone\.weights=.*other\.safetensors has other weights .* restore those"):
        open_stages(again)
    changed = configs.plain(opened(task("frozen", weights=str(tmp_path / "other.safetensors")))[0])
    assert [line.split(":")[0] for line in configs.differences(configs.plain(config), changed)] == ["stages.backbone.fingerprint"]


@pytest.mark.full
def test_untrained_weights_of_a_file_are_of_the_same_network(weights):
    frozen = {each: open_stages(task("frozen", weights=weights["vit"], untrained=each))[1]["backbone"] for each in (False, True)}
    shapes = [jax.tree.map(np.shape, tree) for tree in frozen.values()]
    assert shapes[0] == shapes[1]
    kernels = [tree["params"]["net"]["encoder"]["patch_embed"]["kernel"] for tree in frozen.values()]
    assert np.abs(np.subtract(*kernels)).max() > 0.05
    again = open_stages(task("frozen", weights=weights["vit"], untrained=True))[1]["backbone"]
    jax.tree.map(np.testing.assert_array_equal, again, frozen[True])


@pytest.mark.full
def test_shapes_of_a_stage_from_a_file(weights):
    config = task("frozen", weights=weights["resnet"])
    shapes, arrays = abstract_stages(config, "cpu")[1]["backbone"], open_stages(config)[1]["backbone"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), arrays)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(), r"backbone\.workdir is not set; .* or a file of weights with --config\.stages\.backbone\.weights=FILE"),
        (dict(weights="a.pth", workdir="runs/a"), r"has weights=a\.pth and workdir=runs/a; give a run, or a file of weights alone"),
        (dict(weights="a.pth", step=3), r"has weights=a\.pth and step=3"),
        (dict(weights="nowhere.pth"), r"nowhere\.pth is no file"),
    ],
    ids=["nothing", "both", "step", "missing"],
)
def test_a_stage_needs_a_run_or_a_file(fields, message):
    with pytest.raises(UserError, match=message):
        open_stages(task("frozen", **fields))


def warm(path, encoder, *overrides):
    config = configs.load(
        RECIPE, [f"--config.warm_start.workdir={path}", "--config.dtype=float32", "--config.batch_size=16", *overrides]
    )
    with config.unlocked():
        config.model.encoder = encoder
    return build_experiment(config, jax.devices()[:1])


@pytest.mark.full
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_training_starts_from_a_file(kind, weights):
    encoder = {"vit": SPEC, "resnet": RESNET}[kind]
    experiment = warm(weights[kind], encoder)
    state, found = initial_state(experiment), read_encoder(weights[kind])
    here = jax.device_get(state.params["net"]["encoder"])
    if kind == "vit":  # of 48 pixels here
        assert here.pop("pos_embed").shape == (1, 37, 32)
        found.params.pop("pos_embed")
    jax.tree.map(np.testing.assert_array_equal, here, found.params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.mutable["batch_stats"].get("encoder", {})), found.batch_stats)


@pytest.mark.full
def test_training_from_a_file_with_another_encoder_is_refused(weights):
    with pytest.raises(UserError, match=r"net/encoder/layer1_0/bn1/bias has shape \(32,\) here and \(64,\) there"):
        initial_state(warm(weights["resnet"], {**RESNET, "width": 0.5}))
    with pytest.raises(UserError, match=r"vit\.safetensors has net/encoder/.*, and this model no net/encoder/"):
        initial_state(warm(weights["vit"], {**SPEC, "pool": "gap"}))


@pytest.mark.full
def test_evaluations_of_a_file_and_of_its_untrained_network(weights, tmp_path, capsys):
    command = ["evaluate", f"--weights={weights['vit']}", "--config=configs/rotation.py:smoke", "--config.data.test_split=test[:64]"]
    assert main([*command, f"--output={tmp_path}/out", "--eval=knn,k=5,label=knn"]) == 0
    assert "pretrained on scenes" in capsys.readouterr().out
    entries = json.loads((tmp_path / "out" / "evaluations.json").read_text())
    assert sorted(entry["subject"] for entry in entries) == ["raw pixels", "trained", "untrained"]
    record = json.loads((tmp_path / "out" / "weights.json").read_text())
    assert (record["weights"], record["encoder"]["variant"]) == (weights["vit"], "mu/8")

    # By hand: five neighbors by cosine, weighted by exp(similarity / 0.07), of the features of the file.
    def split(name):
        data = open_source("scenes", name)
        return np.stack([decoded(data[i]["image"]) for i in range(len(data))]), np.array([data[i]["label"] for i in range(len(data))])

    (bank, labels), (query, answers) = split("train[:512]"), split("test[:64]")
    bank, query = (np.asarray(encoded(weights["vit"], x)["pooled"], np.float64) for x in (bank, query))
    bank, query = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, query))
    similar = query @ bank.T
    votes = np.zeros((64, 12))
    for row, order in enumerate(np.argsort(-similar, axis=1)[:, :5]):
        for place in order:
            votes[row, labels[place]] += np.exp(similar[row, place] / 0.07)
    trained = next(entry for entry in entries if entry["subject"] == "trained")
    assert trained["metrics"]["knn/top1"] == pytest.approx(100 * np.mean(votes.argmax(1) == answers), abs=1.6)  # one near tie
    # The numbers of other weights do not mix with these.
    other = ["evaluate", f"--weights={weights['resnet']}", *command[2:], f"--output={tmp_path}/out", "--eval=knn,k=5,label=knn"]
    assert main(other) == 2
    assert "has evaluations of other weights" in capsys.readouterr().err


def decoded(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def test_a_method_without_phases_cannot_be_trained(weights):
    config, _, _ = opened(task("frozen", weights=weights["vit"]))
    whole = configs.load(RECIPE, ["--config.batch_size=16"])
    with whole.unlocked():
        whole.method, whole.model = "pretrained", config.stages.backbone.config.model
    with pytest.raises(UserError, match=r"config\.method='pretrained' has nothing to train; evaluate its file with"):
        build_experiment(whole, jax.devices()[:1])
