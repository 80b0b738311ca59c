"""Exports: every form gives the same features, in PyTorch too; wrong input and damaged files raise one-line errors."""

import functools
import json
import os
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from disks import full_disk
from safetensors.numpy import load_file, save_file
from torch_reference import require_timm, require_torch, require_torchvision

import ssl_jax
from launch import main
from ssl_jax import export, files
from ssl_jax.engine.checkpoint import Checkpoints
from ssl_jax.engine.method import Method, State
from ssl_jax.errors import MachineFault, UserError
from ssl_jax.experiment import config as configs
from ssl_jax.experiment import export_run as exporting
from ssl_jax.export import card as cards
from ssl_jax.export.source import difference, find_encoder
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.common import init_variables

ROOT = pathlib.Path(__file__).parent.parent
SIZE, TOTAL = 16, 8
RESNET = {"name": "resnet", "depth": 10, "width": 0.125, "stem": "cifar"}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
METRICS = {"knn/top1": 71.25}
PROTOCOLS = {"knn": "cosine, k=20"}


def smoke_config(encoder=RESNET, size=SIZE):
    """The resolved config of a small SimCLR run, as a workdir holds it."""
    config = configs.load(f"{ROOT}/configs/simclr.py:smoke")
    with config.unlocked():
        config.model.encoder = encoder
        config.model.head.widths = (16, 8)
        config.model.mean, config.model.std = MEAN, STD
        config.views = ((("random_resized_crop", {"size": size}),),) * 2
        config.data.image_shape, config.data.num_classes, config.data.examples = (size, size, 3), 10, 512
        config.dtype = "float32"
    return configs.from_plain(configs.plain(config))


def randomized(tree, seed):
    """Weights and statistics away from their initial values, so that every one of them matters."""
    rng = np.random.default_rng(seed)

    def noisy(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        name = path[-1].key
        if name in ("var", "scale"):
            return jnp.asarray(1 + 0.2 * np.clip(noise, -3, 3))
        return jnp.asarray(noise / np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.2 * noise)

    return jax.tree_util.tree_map_with_path(noisy, tree)


def trained(config, seed=0):
    """(params, mutable) as if from training."""
    method = export.source.build_method(config)
    batch = {"image": method.inputs["image"].batch(4)}
    return randomized(jax.eval_shape(method.init, jax.random.key(0), batch, {}), seed)


def images(batch=3, size=SIZE, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (batch, size, size, 3), np.uint8)


def export_run(workdir, form="all", step=None, output=None, dtype="float32"):
    """What was exported: {folder: card}."""
    return dict(exporting.export(workdir, output or workdir / "export", form, step, dtype))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished run, one checkpoint before the end and one at it, exported in every form."""
    path = tmp_path_factory.mktemp("run")
    config = smoke_config()
    (path / "config.json").write_text(json.dumps(configs.plain(config)))
    (path / "evaluations.json").write_text(
        json.dumps(
            [
                {"subject": subject, "step": step, "metrics": metrics, "protocols": PROTOCOLS}
                for subject, step, metrics in (
                    ("untrained", 0, {"knn/top1": 20.0}),
                    ("trained", 4, {"knn/top1": 50.0}),
                    ("trained", TOTAL, METRICS),
                )
            ]
        )
    )
    checkpoints = Checkpoints(path / "checkpoints")
    for step in (4, TOTAL):
        params, mutable = trained(config, seed=step)
        checkpoints.save(State(np.int32(step), params, {"net": jnp.zeros(3)}, mutable, {}), configs.plain(config))
    checkpoints.wait()
    checkpoints.close()
    assert [folder.name for folder in export_run(path)] == list(export.FORMATS)
    return path


@pytest.fixture(scope="module")
def encoders(workdir):
    return {form: ssl_jax.load(workdir / "export" / form) for form in export.FORMATS}


def test_readme_example_of_loading_an_export_runs(workdir):
    (example,) = re.findall(r"```python\n(.*?)```", (pathlib.Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)
    names = {"images": np.zeros((3, *smoke_config().data.image_shape), np.uint8)}
    exec(example.replace("runs/b", str(workdir)), names)
    assert names["features"].shape[0] == 3
    assert names["features"].dtype == jnp.float32


@pytest.mark.full
def test_every_form_gives_the_features_of_the_method_for_any_batch(workdir, encoders):
    config = smoke_config()
    method = export.source.build_method(config)
    encode = jax.jit(functools.partial(method.encode, *trained(config, seed=TOTAL)))
    for batch in (1, 5):
        x = images(batch)
        expected = encode(x)
        for form, encoder in encoders.items():
            features = encoder(jnp.asarray(x) if batch == 1 else x)
            assert set(features) == set(encoder.card["features"])
            assert set(features) >= {"pooled", "layer1", "layer4"}
            assert ("projection" in features) == (form != "safetensors")
            for name, value in features.items():
                assert value.shape == (batch, *encoder.card["features"][name][1:])
                np.testing.assert_allclose(value, expected[name], atol=1e-5 * np.abs(expected[name]).max(), rtol=0)
    assert np.abs(expected["pooled"]).max() > 0.1


def test_card_describes_run_input_and_features(workdir, encoders):
    for form, encoder in encoders.items():
        card = encoder.card
        assert card == json.loads((workdir / "export" / form / "card.json").read_text())
        assert (card["format"], card["method"], card["step"], card["total_steps"]) == (form, "simclr", TOTAL, TOTAL)
        assert (card["metrics"], card["protocols"]) == (METRICS, PROTOCOLS)
        assert card["config"] == configs.plain(smoke_config())
        assert (card["input"]["color_space"], card["input"]["dtype"]) == ("RGB", "uint8")
        assert (card["input"]["height"], card["input"]["width"]) == (SIZE, SIZE)
        assert card["input"]["normalization"]["mean"] == list(MEAN)
        assert card["features"]["pooled"] == ["b", 64]
        assert card["versions"]["export"]["packages"]["jax"] == jax.__version__
        assert card["versions"]["ssl_jax"] == ssl_jax.__version__
        assert card["largest_difference"] < 1e-5
    assert set(encoders["stablehlo"].card["stablehlo"]["platforms"]) == {"cpu", "cuda", "tpu"}
    assert set(encoders["safetensors"].card["files"]) == {"weights.safetensors"}
    assert f'version = "{ssl_jax.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(("name", "reads"), [
    ("rotation", ""), ("jigsaw", "each image with mean 0 and standard deviation 1"), ("colorization", "L / 50 - 1 of CIE Lab"),
    ("split_brain", "L / 50 - 1 for one half of the encoder, (a, b) / 110 for the other"),
])  # fmt: skip
def test_card_says_what_the_encoder_reads(name, reads):
    config = configs.load(f"{ROOT}/configs/{name}.py:smoke").copy_and_resolve_references()
    with config.unlocked():
        config.data.image_shape, config.data.num_classes, config.dtype = (48, 48, 3), 12, "float32"
    about = {"step": 0, "total_steps": 1, "metrics": {}, "protocols": {}, "versions": {}}
    method = export.source.build_method(config)
    source = export.source.Source(config, method, {}, {}, (48, 48, 3), np.zeros((2, 48, 48, 3), np.uint8), {})
    said = export.card.make_card("stablehlo", source, {}, about)["input"]["normalization"]
    assert reads in said["then"] and ("mean" in said) == (not reads)


@pytest.mark.full
def test_stablehlo_weights_hold_only_what_encode_uses(tmp_path):
    config = smoke_config()
    params, mutable = trained(config)
    source = export.make_source(config, params, {**mutable, "queue": jnp.zeros((1000, 8))})
    export.write(tmp_path / "stablehlo", "stablehlo", source, about())
    weights = load_file(tmp_path / "stablehlo" / "weights.safetensors")
    assert set(weights) == {
        *(f"params/{name}" for name in export.formats.leaf_names(params)),
        *(f"mutable/{name}" for name in export.formats.leaf_names(mutable)),
    }


def about():
    return {"step": TOTAL, "total_steps": TOTAL, "metrics": {}, "protocols": {}, "versions": {}}


def in_torch(folder, monkeypatch, x):
    """Features of the model that the recipe of the card builds and loads with strict=True."""
    torch = require_torch()
    monkeypatch.chdir(folder)
    scope = {}
    exec(json.loads((folder / "card.json").read_text())["torch"]["code"], scope)  # as a reader of the card would
    return scope["encode"](torch.from_numpy(x)).numpy()


def test_pytorch_features_of_an_exported_run(workdir, encoders, monkeypatch):
    """A width that torchvision has no argument for, with CIFAR's stem."""
    require_torchvision()
    ours = np.asarray(encoders["safetensors"](images())["pooled"])
    theirs = in_torch(workdir / "export" / "safetensors", monkeypatch, images())
    np.testing.assert_allclose(theirs, ours, atol=1e-4 * np.abs(ours).max(), rtol=0)
    assert encoders["safetensors"].card["torch"]["constructor"] is None


@pytest.mark.full
@pytest.mark.parametrize(
    ("fields", "constructor"),
    [
        ({"name": "resnet", "depth": 18, "stem": "imagenet"}, "torchvision.models.resnet18()"),
        ({"name": "resnet", "depth": 50, "width": 0.125, "stem": "imagenet"}, None),
        ({"name": "vit", "variant": "mu/8"}, "timm.models.VisionTransformer(img_size=32, patch_size=8, "),
        ({"name": "vit", "variant": "mu/8", "registers": 2}, "timm.models.VisionTransformer(img_size=32, "),
        ({"name": "vit", "variant": "mu/8", "pool": "gap", "position": "sincos2d"}, "timm.models.VisionTransformer("),
    ],
    ids=["torchvision's own", "narrow bottlenecks", "class token", "registers", "average, fixed positions"],
)
def test_pytorch_features_of_resnet_and_vit_exports(fields, constructor, tmp_path, monkeypatch):
    _ = require_torchvision() if fields["name"] == "resnet" else require_timm()
    config = smoke_config(fields, size=32)
    source = export.make_source(config, *trained(config))
    card = export.write(tmp_path / "safetensors", "safetensors", source, about())
    ours = source.expected["pooled"]
    theirs = in_torch(tmp_path / "safetensors", monkeypatch, source.probe)
    np.testing.assert_allclose(theirs, ours, atol=1e-4 * np.abs(ours).max(), rtol=0)
    found = card["torch"]["constructor"]
    assert found is None if constructor is None else found.startswith(constructor)


@pytest.mark.full
def test_safetensors_export_without_pytorch_layout_is_refused(tmp_path):
    encoder = {"name": "resnet", "depth": 10, "width": 0.125, "stem": "cifar", "flavor": "simclr"}
    config = smoke_config(encoder)
    source = export.make_source(config, *trained(config))
    with pytest.raises(export.NoTorchLayout, match=r"shortcut of layer1\.0"):
        export.write(tmp_path / "safetensors", "safetensors", source, about())
    assert list(tmp_path.iterdir()) == []


def test_export_of_checkpoint_with_nan_is_refused():
    config = smoke_config({"name": "mlp", "widths": (4,)})
    diverged = jax.tree.map(lambda x: x * np.nan, trained(config))
    with pytest.raises(UserError, match="is not finite; export an earlier one with --step=N"):
        export.make_source(config, *diverged)


def test_safetensors_export_reads_the_declared_encoder_of_a_method():
    """A method that encodes with a moving average exports that one, not the network under training."""
    config = smoke_config()
    init = functools.partial(init_variables, build_encoder(RESNET))
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    student, teacher = randomized(shapes, 1), randomized(shapes, 2)
    params = {"student": {"encoder": student[0]}}
    mutable = {"ema": {"encoder": teacher[0]}, "stats": {"student": student[1], "teacher": teacher[1]}}

    def encode(scale):
        features = export.source.encoder_function(config)(*teacher, images(2))
        return jax.device_get({**features, "pooled": features["pooled"] * scale})

    method = Method({}, None, (), None, encoder=("ema", "encoder"), encoder_stats=("stats", "teacher"))
    source = export.Source(config, method, params, mutable, (SIZE, SIZE, 3), images(2), encode(scale=1.0))
    jax.tree.map(np.testing.assert_array_equal, find_encoder(source), teacher)
    online = method._replace(encoder=("student", "encoder"), encoder_stats=("stats", "student"))
    with pytest.raises(UserError, match=r"not those of config.model.encoder alone"):
        find_encoder(source._replace(method=online))
    with pytest.raises(UserError, match=r"'simclr' has no separate encoder; export with --format=orbax or"):
        find_encoder(source._replace(method=method._replace(encoder=None)))
    with pytest.raises(KeyError, match="nowhere"):  # a wrong path is a coding mistake of the method
        find_encoder(source._replace(method=method._replace(encoder=("ema", "nowhere"))))
    with pytest.raises(UserError, match=r"not those of config.model.encoder alone.* --format=orbax or"):
        find_encoder(source._replace(expected=encode(scale=1.5)))
    assert difference({"a": np.ones(2)}, {"a": np.full(2, 2.0)}) == 0.5
    assert difference({"a": np.array([1, np.nan])}, {"a": np.ones(2)}) == difference({"b": np.ones(2)}, {"a": np.ones(2)}) == np.inf


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (images().astype(np.float32) / 255, r"not float32 \[3, 16, 16, 3\]; it scales .* \(images \* 255\).round\(\)"),
        (
            images().astype(np.int32),
            r"RGB images \[B, .*, 3\] with values 0 .. 255, not int32 .*astype\('uint8'\)",
        ),
        (images().transpose(0, 3, 1, 2), r"channels come last: images.transpose\(0, 2, 3, 1\)"),
        (images()[..., :1], "grayscale becomes RGB by numpy.repeat"),
        (images()[..., 0], "grayscale becomes RGB by numpy.repeat"),
        (images()[0], r"add the batch axis: images\[None\]"),
        (np.concatenate([images(), images()[..., :1]], -1), r"drop the alpha channel: images\[..., :3\]"),
        (images()[:0], "at least one image"),
        (images()[0, 0], "channels last"),
        ([[1, 2], [3]], "not a list; convert it with numpy.asarray"),
    ],
)
def test_encode_refuses_images_of_wrong_type_or_shape(wrong, message, encoders):
    for encoder in encoders.values():
        with pytest.raises(UserError, match=message) as error:
            encoder(wrong)
        assert "\n" not in str(error.value)


def test_image_size_is_free_for_safetensors_only(encoders):
    assert encoders["safetensors"](images(size=24))["layer4"].shape == (3, 3, 3, 64)
    for form in ("orbax", "stablehlo"):
        with pytest.raises(UserError, match=r"\[B, 16, 16, 3\] .* not uint8 \[3, 24, 24, 3\]; resize them"):
            encoders[form](images(size=24))


def copy(workdir, form, target):
    return pathlib.Path(shutil.copytree(workdir / "export" / form, target / form))


def test_damaged_files_and_invalid_cards_are_refused(workdir, tmp_path):
    with pytest.raises(UserError, match="holds no export"):
        ssl_jax.load(tmp_path)
    for form in export.FORMATS:
        folder = copy(workdir, form, tmp_path)
        name = max(cards.open_card(folder)["files"].items(), key=lambda item: item[1]["bytes"])[0]
        content = bytearray((folder / name).read_bytes())
        content[-5] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is damaged: its SHA-256 differs from the card"):
            ssl_jax.load(folder)
        (folder / name).unlink()
        with pytest.raises(UserError, match=f"has no '{name}', which its card lists"):
            ssl_jax.load(folder)

    folder = tmp_path / "safetensors"
    card = json.loads((folder / "card.json").read_text())
    for change, message in (
        ({"schema": 2}, "has schema 2 and this ssl_jax reads 1"),
        ({"files": {}, "format": "pickle"}, "is of format 'pickle'; this ssl_jax reads safetensors, orbax, stablehlo"),
        ({"files": {"../orbax/card.json": {"sha256": ""}}}, "has no '../orbax/card.json'"),
        ({"files": []}, "has a list as 'files'"),
        ({"input": {}}, "images of None x None"),
        ({"input": {**card["input"], "height": 10**9}}, "images of 1000000000 x 16"),
        ({"features": {"pooled": [3]}}, r"feature 'pooled' has shape \[3\]"),
    ):
        (folder / "card.json").write_text(json.dumps({**card, **change}))
        with pytest.raises(UserError, match=message):
            ssl_jax.load(folder)
    (folder / "card.json").write_text("{")
    with pytest.raises(UserError, match=r"card\.json is damaged \(no JSON"):
        ssl_jax.load(folder)


def test_stablehlo_with_native_calls_or_unreadable_is_refused(workdir, tmp_path):
    folder = copy(workdir, "stablehlo", tmp_path)
    card = cards.open_card(folder)

    native = jax.ffi.ffi_call("run_anything", jax.ShapeDtypeStruct((1, 3), np.float32))
    allowed = [jax.export.DisabledSafetyCheck.custom_call("run_anything")]
    exported = jax.export.export(jax.jit(lambda weights, x: {"pooled": native(x)}), disabled_checks=allowed)(
        {}, jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.uint8)
    )
    (folder / "encode.stablehlo").write_bytes(exported.serialize())
    cards.seal(folder, {k: v for k, v in card.items() if k != "files"})
    with pytest.raises(UserError, match=r"calls native code \(run_anything\), which is refused"):
        ssl_jax.load(folder)

    (folder / "encode.stablehlo").write_bytes(b"nonsense")
    cards.seal(folder, {k: v for k, v in card.items() if k != "files"})
    with pytest.raises(UserError, match=r"encode\.stablehlo is damaged or no StableHLO program"):
        ssl_jax.load(folder)
    cards.seal(folder, {**{k: v for k, v in card.items() if k != "files"}, "stablehlo": {"jax": "0.0.1"}})
    with pytest.raises(UserError, match=f"written by jax 0.0.1 and cannot be read by jax {jax.__version__}"):
        ssl_jax.load(folder)


def loop(rounds):
    def run(weights, x):
        start = jnp.zeros((x.shape[0], 3)) + x.min()
        return {"pooled": jax.lax.while_loop(lambda i: i.max() < rounds, lambda i: jnp.sin(i), start)}

    return run


def steps(count):
    def run(weights, x):
        return {"pooled": jax.lax.scan(lambda y, _: (y * 0.5 + 1, None), jnp.zeros((x.shape[0], 3)), None, count)[0]}

    return run


def large(sides, give):
    def run(weights, x):
        middle = jnp.ones((x.shape[0], *sides), jnp.float32) * x.max()
        return {"pooled": middle if give else middle.sum(-1)[:, :3]}

    return run


HUGE = (100_000, 100_000)
TAMPERED = {  # name: (program, its features in the card, message; '': it is right)
    "right": (lambda w, x: {"pooled": jnp.zeros((x.shape[0], 3))}, [3], ""),
    "scan": (steps(12), [3], ""),
    "wrong shape": (lambda w, x: {"pooled": jnp.zeros((x.shape[0], 4))}, [3], "it gives the features"),
    "other name": (lambda w, x: {"other": jnp.zeros((x.shape[0], 3))}, [3], "it gives the features"),
    "no outputs": (lambda w, x: {}, [3], "it gives the features none"),
    "one output": (lambda w, x: jnp.zeros((x.shape[0], 3)), [3], "it gives the features none"),
    "huge result": (large(HUGE, True), [3], "is refused as too large"),
    "huge result in the card, too": (large(HUGE, True), HUGE, "is refused as too large"),
    "huge array inside": (large(HUGE, False), [3], "is refused as too large"),
    "endless loop": (loop(1000), [3], "has a loop of unknown rounds"),
    "long loop": (steps(10**9), [3], "has a loop of 1,000,000,000 rounds"),
    "memory": (lambda w, x: {"pooled": jnp.sort(jnp.sin(x.max() * jnp.arange(2e6)))[None, ::700_000] + x[:, :1, 0, 0]}, [3], "for 1 "),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_program_is_refused_before_it_runs(workdir, tmp_path, name, monkeypatch):
    program, shape, message = TAMPERED[name]
    folder = copy(workdir, "stablehlo", tmp_path)
    if name == "memory":
        monkeypatch.setattr("ssl_jax.export.program.MEMORY", -1_000_000)
        monkeypatch.setattr("ssl_jax.export.program.LARGEST", 8_000_000)
    write_program(folder, program, {"pooled": ["b", *shape]})
    if not message:
        assert ssl_jax.load(folder)(images())["pooled"].shape == (3, 3)
        return
    with pytest.raises(UserError, match=message):
        ssl_jax.load(folder)(images(1))


def write_program(folder, function, features, batch="b", side=SIZE, dtype=np.uint8, weights=()):
    size = jax.export.symbolic_shape(batch)[0] if isinstance(batch, str) else batch
    given = {name: jax.ShapeDtypeStruct((2,), np.float32) for name in weights}
    exported = jax.export.export(jax.jit(function))(given, jax.ShapeDtypeStruct((size, side, side, 3), dtype))
    (folder / "encode.stablehlo").write_bytes(exported.serialize())
    card = json.loads((folder / "card.json").read_text())
    cards.seal(folder, {**{k: v for k, v in card.items() if k != "files"}, "features": features})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 1}, r"it takes uint8 \[1, 16, 16, 3\], not uint8 \[b, 16, 16, 3\]"),
        ({"side": 17}, r"it takes uint8 \[b, 17, 17, 3\], not"),
        ({"dtype": np.float32}, r"it takes float32"),
        ({"weights": ("nothing",)}, "weight 'nothing' is missing or has another shape"),
    ],
)
def test_a_program_of_other_arguments_than_the_card_is_refused(workdir, tmp_path, change, message):
    folder = copy(workdir, "stablehlo", tmp_path)
    write_program(folder, TAMPERED["right"][0], {"pooled": ["b", 3]}, **change)
    with pytest.raises(UserError, match=message):
        ssl_jax.load(folder)


@pytest.mark.parametrize("change", [{}, {"model": 3}, {"mean": [0.0] * 4}, {"model": {"encoder": {"name": "resnet", "depth": "x"}}}])
def test_a_card_with_another_config_than_its_files_is_refused(workdir, tmp_path, change):
    for form in ("safetensors", "orbax"):
        folder = copy(workdir, form, tmp_path)
        card = json.loads((folder / "card.json").read_text())
        config = {**card["config"], **change} if change else {}
        if "mean" in change:
            config["model"] = {**card["config"]["model"], **change}
        (folder / "card.json").write_text(json.dumps({**card, "config": config}))
        with pytest.raises(UserError):
            ssl_jax.load(folder)


def test_parameters_that_inflate_are_refused(tmp_path):
    with export.formats.ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", {"params": {"a": jnp.zeros((40_000_000,))}, "mutable": {}})
    with pytest.raises(UserError, match="would inflate to 160,000,000"):
        export.formats.read_orbax(tmp_path, {"config": configs.plain(smoke_config())})


@pytest.mark.full
def test_export_command_errors_and_export_of_an_earlier_step(workdir, tmp_path, capsys):
    config = json.loads((workdir / "config.json").read_text())
    for name in ("checkpoints", "evaluations.json"):
        (tmp_path / name).symlink_to(workdir / name)
    (tmp_path / "config.json").write_text(json.dumps({**config, "total": "20 steps"}))
    with pytest.raises(UserError, match=r"is unfinished \(step 8 of 20\); finish .* with --step=8"):
        export_run(tmp_path)
    with pytest.raises(UserError, match=r"has no checkpoint 5; there are \[4, 8\]"):
        export_run(tmp_path, step=5)
    with pytest.raises(UserError, match="--dtype=float16 is unknown; choose float32, bfloat16"):
        export_run(tmp_path, dtype="float16")
    with pytest.raises(UserError, match="--format=onnx is unknown; choose safetensors, orbax, stablehlo, all"):
        export_run(tmp_path, form="onnx")
    assert main(["export", f"--workdir={tmp_path}", "--config.seed=1"]) == 2
    assert "'--config.seed=1' is not understood; export writes a run as it was trained" in capsys.readouterr().err

    output = tmp_path / "output"
    (output / "safetensors").mkdir(parents=True)
    (output / "safetensors" / "precious.txt").write_text("mine")
    flags = ("--format=safetensors", "--step=4", f"--output={output}", "--dtype=bfloat16")
    assert main(["export", f"--workdir={tmp_path}", *flags]) == 2
    assert "exists and is not an export; choose another --output" in capsys.readouterr().err
    (output / "safetensors" / "precious.txt").unlink()
    assert main(["export", f"--workdir={tmp_path}", *flags]) == 0
    assert [path.name for path in output.iterdir()] == ["safetensors"]
    assert "step 4" in capsys.readouterr().out
    encoder = ssl_jax.load(output / "safetensors" / "weights.safetensors")
    assert (encoder.card["step"], encoder.card["total_steps"], encoder.card["metrics"]) == (4, 20, {"knn/top1": 50.0})
    assert encoder(images())["layer4"].dtype == jnp.bfloat16


def test_export_is_replaced_atomically(workdir, tmp_path, monkeypatch):
    folder = copy(workdir, "safetensors", tmp_path)
    config = smoke_config()
    method = export.source.build_method(config)
    source = export.Source(config, method, {}, {}, (SIZE, SIZE, 3), images(2), {"pooled": np.zeros((2, 3))})

    def writer(fails):
        def write(path, source):
            (path / "half").write_bytes(b"half")
            if fails:
                raise OSError(28, "No space left on device")
            return {}

        return write

    def reader(path, card):
        return {"encode": lambda x: source.expected}

    before = (folder / "card.json").read_text()
    monkeypatch.setitem(export.FORMATS, "safetensors", (writer(fails=True), reader))
    with pytest.raises(MachineFault, match=r"cannot be written: No space left on device; free space or"):
        export.write(folder, "safetensors", source, about())
    assert (folder / "card.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["safetensors"]

    monkeypatch.setitem(export.FORMATS, "safetensors", (writer(fails=False), reader))
    card = export.write(folder, "safetensors", source, about())
    assert set(card["files"]) == {"half"} == {path.name for path in folder.iterdir()} - {"card.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["safetensors"]


@pytest.mark.full
def test_killed_exports_leave_nothing_that_stops_the_next_one(workdir, tmp_path):
    """In containers every process may have the id 1."""
    output = tmp_path / "e[1]"
    folder = copy(workdir, "orbax", output)
    building = output / f".orbax.writing-{os.getpid()}"
    shutil.copytree(folder, building)
    folder.rename(output / f".orbax.old-{os.getpid()}")  # killed between the two renames
    lock = files.lock(output / ".orbax.lock")
    with pytest.raises(UserError, match="is being written by another process"):
        export_run(workdir, "orbax", output=output)
    assert building.exists()
    lock.close()
    export_run(workdir, "orbax", output=output)
    assert [path.name for path in output.iterdir()] == ["orbax"]
    here, there = (ssl_jax.load(path)(images())["pooled"] for path in (folder, workdir / "export" / "orbax"))
    np.testing.assert_array_equal(here, there)


@pytest.mark.parametrize("form", export.FORMATS)
def test_full_disk_is_one_line_for_every_form(workdir, tmp_path, form, capfd):
    with full_disk(tmp_path / "disk", "64k") as disk:
        assert main(["export", f"--workdir={workdir}", f"--format={form}", f"--output={disk}"]) == 74
        assert list(disk.iterdir()) == []
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "cannot be written: No space left on device" in lines[0], lines


def test_weights_that_do_not_match_the_config_are_refused(workdir, tmp_path):
    """The layout check also catches weights and card that were edited consistently."""
    folder = copy(workdir, "safetensors", tmp_path)
    card = cards.open_card(folder)
    weights = load_file(folder / "weights.safetensors")
    weights["layer9.weight"] = weights.pop("conv1.weight")
    save_file(weights, folder / "weights.safetensors")
    cards.seal(folder, {k: v for k, v in card.items() if k != "files"})
    with pytest.raises(UserError, match=r"conv1\.weight is missing; layer9\.weight is unexpected"):
        ssl_jax.load(folder)
