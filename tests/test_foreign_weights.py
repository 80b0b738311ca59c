"""Weights of torchvision, timm, DINO, DINOv2, MAE and MoCo: the same features here, and files that do not fit are refused."""

import argparse
import functools
import json
import pickle
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_torch_layout import GAP, MU, REGISTERS, pixels, randomize, run_theirs
from torch_reference import require_timm, require_torch, require_torchvision

from ssl_jax.augment.pixels import to_input
from ssl_jax.errors import UserError
from ssl_jax.export.torch_recipe import torch_recipe
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.backbones.vit import resize_positions
from ssl_jax.models.common import apply, init_variables
from ssl_jax.models.pretrained.foreign import read_encoder
from ssl_jax.models.pretrained.torch_layout import to_torch

MU = {**MU, "mlp_ratio": 4.0}


def features(found, images):
    run = jax.jit(functools.partial(apply, build_encoder(found.spec), train=False))
    return run(found.params, found.batch_stats, images)[0]


def saved(path, state):
    """`state` as torch.save or safetensors writes it, by the suffix of `path`."""
    torch = require_torch()
    if path.suffix == ".safetensors":
        save_file({name: np.ascontiguousarray(value) for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def vit(name="vit_small_patch16_224", size=48, **arguments):
    return randomize(require_timm().create_model(name, img_size=size, **arguments))


def with_prefix(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def check_same_features(path, model, size, spec):
    found = read_encoder(path)
    assert found.spec == {"name": "vit", **spec}
    x = pixels(size)
    tokens = run_theirs(model.forward_features, x).numpy()
    ours = features(found, x)
    np.testing.assert_allclose(ours["tokens"], tokens, atol=1e-4)
    np.testing.assert_allclose(ours["pooled"], tokens[:, 0], atol=1e-4)
    return found


@pytest.mark.full
@pytest.mark.parametrize("depth", [18, 50])
def test_features_of_torchvision_resnets(depth, tmp_path):
    model = randomize(getattr(require_torchvision().models, f"resnet{depth}")())
    path = saved(tmp_path / "resnet.pth", model.state_dict())
    found = read_encoder(path)
    assert (found.spec, found.size) == ({"name": "resnet", "depth": depth}, 224)
    names = set(to_torch(found.spec, found.params, found.batch_stats))
    assert names == {name for name in model.state_dict() if not name.startswith("fc.")}
    model.fc = require_torch().nn.Identity()
    x = pixels(65)
    theirs = run_theirs(model, x).numpy()
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(features(found, x)["pooled"] / scale, theirs / scale, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "size", "spec"),
    [
        ("vit_small_patch16_224", 48, dict(variant="S/16", pool="cls")),
        ("vit_small_patch14_dinov2", 56, dict(variant="S/14", pool="cls", layer_scale=1e-5)),
        ("vit_small_patch14_reg4_dinov2", 56, dict(variant="S/14", pool="cls", registers=4, layer_scale=1e-5)),
    ],
)
def test_features_of_timm_vits(name, size, spec, tmp_path):
    model = vit(name, size)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    found = check_same_features(saved(tmp_path / "model.safetensors", state), model, size, spec)
    names = set(to_torch(found.spec, found.params, found.batch_stats))
    assert names == {key for key in state if not key.startswith("head.")}
    assert found.size == size


@pytest.mark.full
def test_features_of_a_mae_encoder_whose_decoder_is_left_out(tmp_path, caplog):
    model = vit("vit_base_patch16_224", num_classes=0)
    torch = require_torch()
    decoder = {"mask_token": torch.zeros(1, 1, 512), "decoder_pos_embed": torch.zeros(1, 10, 512)}
    decoder |= {f"decoder_{name}": torch.zeros(3) for name in ("embed.weight", "blocks.0.norm1.weight", "norm.bias", "pred.bias")}
    checkpoint = {"model": {**model.state_dict(), **decoder}, "epoch": 800, "args": argparse.Namespace(lr=1.5e-4), "optimizer": {}}
    path = saved(tmp_path / "mae.pth", checkpoint)
    with caplog.at_level("INFO", "ssl_jax"):
        check_same_features(path, model, 48, dict(variant="B/16", pool="cls"))
    assert "at 'model' (not read: epoch, args, optimizer)" in caplog.text
    assert "left out: the token of masked patches (1), the decoder of MAE (5)" in caplog.text


def dinov2_names(state, registers):
    """A state dict of timm in the names of DINOv2, in chunks of blocks; a class token has a position of its own."""
    torch = require_torch()
    out = {}
    for name, value in state.items():
        name = re.sub(r"^blocks\.", "blocks.0.", name)
        for new, old in (("register_tokens", "reg_token"), ("mlp.w12", "mlp.fc1"), ("mlp.w3", "mlp.fc2")):
            name = name.replace(old, new) if registers or new == "register_tokens" else name
        out[name] = value
    if registers:
        position = torch.linspace(-0.5, 0.5, out["cls_token"].shape[-1])[None, None]
        out["cls_token"] = out["cls_token"] - position
        out["pos_embed"] = torch.cat([position, out["pos_embed"]], 1)
    return {**out, "mask_token": torch.zeros(1, out["cls_token"].shape[-1])}


@pytest.mark.full
@pytest.mark.parametrize("registers", [0, 4])
def test_features_of_dinov2_in_its_own_names(registers, tmp_path):
    # With registers, also the gated MLP of the giant.
    from torch import nn

    timm = require_timm()
    gate = dict(mlp_layer=timm.layers.SwiGLUPacked, act_layer=nn.SiLU) | {"mlp_ratio": 8.0}
    arguments = {**MU, **REGISTERS, **gate} if registers else {**MU}
    model = randomize(timm.models.VisionTransformer(img_size=56, patch_size=14, init_values=1e-5, num_classes=0, **arguments))
    state = dinov2_names(model.state_dict(), registers)
    assert "blocks.0.0.norm1.weight" in state
    plain = {name.replace("blocks.0.", "blocks.", 1): value for name, value in state.items()}  # as the released files
    spec = dict(variant="mu/14", pool="cls", layer_scale=1e-5) | (dict(registers=4, mlp="swiglu") if registers else {})
    for number, each in enumerate((state, plain)):
        training = {"teacher": {**with_prefix("backbone.", each), "dino_head.mlp.0.bias": state["norm.bias"]}}
        found = check_same_features(saved(tmp_path / f"{number}.pth", training if number == 0 else each), model, 56, spec)
    assert found.size == 56
    # Other resolutions have timm's positions.
    resized = randomize(
        timm.models.VisionTransformer(
            img_size=56, patch_size=14, init_values=1e-5, num_classes=0, dynamic_img_size=True, **arguments
        )
    )
    x = np.random.default_rng(1).random((1, 98, 42, 3), np.float32)
    tokens = run_theirs(resized.forward_features, x).numpy()
    np.testing.assert_allclose(features(found, x)["tokens"], tokens, atol=1e-4)


@pytest.mark.full
def test_the_teacher_of_dino_is_taken_and_its_head_left_out(tmp_path, caplog):
    model = vit(num_classes=0, **MU)
    teacher = with_prefix("module.backbone.", model.state_dict()) | {"module.head.mlp.0.weight": require_torch().zeros(3)}
    student = {name: value + 1 for name, value in teacher.items()}
    spec = dict(variant="mu/16", pool="cls")
    whole = {"student": student, "teacher": teacher, "epoch": 3, "args": argparse.Namespace()}
    check_same_features(saved(tmp_path / "dino.pth", whole), model, 48, spec)
    flat = {
        f"{who}.{name.removeprefix('module.')}": value.numpy() for who in ("student", "teacher") for name, value in whole[who].items()
    }
    with caplog.at_level("INFO", "ssl_jax"):
        check_same_features(saved(tmp_path / "flat.safetensors", flat), model, 48, spec)
    assert "of 'teacher.backbone.'" in caplog.text
    assert f"left out: the other encoder ({len(student) - 1}), heads and losses of DINO (2)" in caplog.text
    neck = {**flat, "teacher.neck.weight": flat["teacher.head.mlp.0.weight"]}
    with pytest.raises(UserError, match=r"teacher\.neck\.weight is unexpected"):
        read_encoder(saved(tmp_path / "neck.safetensors", neck))


@pytest.mark.full
def test_the_query_encoder_of_moco_is_taken(tmp_path):
    torch = require_torch()
    model = randomize(require_torchvision().models.resnet18())
    model.fc = torch.nn.Identity()
    query, key = (with_prefix(f"module.encoder_{who}.", model.state_dict()) for who in "qk")
    key = {name: value + 1 for name, value in key.items()}
    heads = {f"module.encoder_q.fc.{i}.weight": torch.zeros(3, 3) for i in (0, 2)}
    state = {**key, **query, **heads, "module.queue": torch.zeros(2, 8), "module.queue_ptr": torch.zeros(1).long()}
    found = read_encoder(saved(tmp_path / "moco.pth.tar", {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {}}))
    x = pixels(65)
    theirs = run_theirs(model, x).numpy()
    np.testing.assert_allclose(features(found, x)["pooled"], theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.full
def test_moco_v3_has_twelve_heads(tmp_path):
    torch = require_torch()
    model = vit(num_classes=0, num_heads=12)
    state = with_prefix("module.base_encoder.", model.state_dict())
    momentum = {name.replace("base", "momentum"): value + 1 for name, value in state.items()}
    others = {"module.base_encoder.head.0.weight": torch.zeros(3), "module.predictor.0.weight": torch.zeros(3)}
    path = saved(tmp_path / "vit-s-300ep.pth.tar", {"state_dict": {**momentum, **state, **others}})
    check_same_features(path, model, 48, dict(variant="S12/16", pool="cls"))


@pytest.mark.full
def test_a_vit_without_class_token_gives_the_mean_of_its_patches(tmp_path):
    model = vit(num_classes=0, **MU, **GAP)
    found = read_encoder(saved(tmp_path / "gap.pth", with_prefix("module.", model.state_dict())))
    assert found.spec == {"name": "vit", "variant": "mu/16", "pool": "gap"}
    x = pixels(48)
    np.testing.assert_allclose(features(found, x)["pooled"], run_theirs(model, x).numpy(), atol=1e-4)


@pytest.mark.full
def test_sizes_of_the_giant_of_dinov2():
    torch, timm = require_torch(), require_timm()
    with torch.device("meta"):
        theirs = timm.create_model("vit_giant_patch14_reg4_dinov2", num_classes=0)
    spec = {"name": "vit", "variant": "g2/14", "registers": 4, "layer_scale": 1e-5, "mlp": "swiglu"}
    images = jax.ShapeDtypeStruct((1, 518, 518, 3), np.float32)
    ours, _ = jax.eval_shape(functools.partial(init_variables, build_encoder(spec)), jax.random.key(0), images)
    assert sorted(leaf.size for leaf in jax.tree.leaves(ours)) == sorted(p.numel() for p in theirs.parameters())


@pytest.mark.full
def test_an_export_with_layer_scale_and_a_gated_mlp_loads_in_timm(tmp_path, monkeypatch):
    require_timm()
    spec = {"name": "vit", "variant": "mu/14", "registers": 4, "layer_scale": 1.0, "mlp": "swiglu"}
    state, scope = state_of(spec, 56), {}
    found = read_encoder(written(tmp_path, state))
    monkeypatch.chdir(tmp_path)
    exec(torch_recipe(spec, found.mean, found.std, state)["code"], scope)  # as a reader of the card would
    images = np.random.default_rng(0).integers(0, 256, (2, 56, 56, 3), np.uint8)
    theirs = scope["encode"](require_torch().from_numpy(images)).numpy()
    np.testing.assert_allclose(features(found, to_input(images, found.mean, found.std))["pooled"], theirs, atol=1e-4)


@pytest.mark.parametrize("grid", [(16, 16), (50, 50), (37, 20)])
def test_positions_of_another_resolution_are_those_of_timm(grid):
    resample = require_timm().layers.resample_abs_pos_embed
    table = np.random.default_rng(0).normal(size=(1, 37 * 37, 8)).astype(np.float32)
    theirs = resample(require_torch().from_numpy(table), list(grid), num_prefix_tokens=0).numpy()
    np.testing.assert_allclose(resize_positions(table, grid), theirs, atol=3e-5)  # another kernel differs by 0.1


# ---- files that do not fit, made without PyTorch

SPEC = {"name": "vit", "variant": "mu/8"}


def state_of(spec, size=16, seed=0):
    init = functools.partial(init_variables, build_encoder(spec))
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(init, jax.random.key(0), np.zeros((1, size, size, 3), np.float32))
    return to_torch(spec, *jax.tree.map(lambda leaf: generator.normal(0, 0.1, leaf.shape).astype(np.float32), shapes))


def written(tmp_path, state, name="weights.safetensors"):
    save_file(state, tmp_path / name)
    return tmp_path / name


def test_a_file_holds_what_was_exported(tmp_path):
    state = state_of(SPEC)
    found = read_encoder(written(tmp_path, with_prefix("module.backbone.", state)))
    assert found.spec == {**SPEC, "pool": "cls"}
    assert (found.size, found.mean[0], found.std[0]) == (16, 0.485, 0.229)
    for name, value in to_torch(found.spec, found.params, found.batch_stats).items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)


@pytest.mark.parametrize("spec", [SPEC, {"name": "resnet", "depth": 18}], ids=["vit", "resnet"])
@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.full
def test_one_tensor_that_is_missing_or_unexpected_or_of_another_shape_is_one_line_with_its_name(spec, prefix, tmp_path):
    state = with_prefix(prefix, state_of(spec))
    fc1, norm = ("blocks.0.mlp.fc1.weight", "norm.bias") if spec is SPEC else ("layer2.0.conv1.weight", "layer4.1.bn2.running_var")
    axes = (1, 0) if spec is SPEC else (1, 0, 2, 3)
    wrong = {
        "is missing": (norm, {name: value for name, value in state.items() if name != prefix + norm}),
        "is unexpected": ("extra.weight", {**state, f"{prefix}extra.weight": np.ones(3, np.float32)}),
        "has shape": (fc1, {**state, prefix + fc1: np.ascontiguousarray(state[prefix + fc1].transpose(axes))}),
        "has shape [65": (norm, {**state, prefix + norm: np.ones(65, np.float32)}),
        "is not finite": (norm, {**state, prefix + norm: state[prefix + norm] * np.float32("nan")}),
    }
    for what, (name, tensors) in wrong.items():
        path = written(tmp_path, tensors)
        with pytest.raises(UserError) as caught:
            read_encoder(path)
        line = str(caught.value)
        assert f"{prefix}{name} {what}" in line and line.startswith(str(path)) and "\n" not in line
        assert line.count(" is ") + line.count(" has ") == 1, line


@pytest.mark.parametrize(
    "name", ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc2.weight", "blocks.0.attn.qkv.bias"]
)
def test_any_missing_tensor_of_a_vit_is_named(name, tmp_path):
    state = state_of(SPEC)
    del state[name]
    with pytest.raises(UserError, match=f"{name}'? is missing"):
        read_encoder(written(tmp_path, state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"a": s["cls_token"]}, "no layout that is known .*'a'.*give a ResNet of torchvision"),
        (lambda s: {"layers." + k: v for k, v in s.items()}, "no layout that is known"),
        (lambda s: {**s, "patch_embed.proj.weight": np.ones((33, 3, 8, 8), np.float32)}, r"\[33, 3, 8, 8\], not \[width, .*384 \(S\)"),
        (lambda s: {**s, "pos_embed": s["pos_embed"][:, :4]}, "'pos_embed' has 3 patch positions"),
        (lambda s: {**s, "decoder.weight": s["cls_token"]}, "decoder.weight is unexpected"),
    ],
    ids=["others", "prefix", "width", "positions", "extra"],
)
def test_unknown_layouts_are_one_line(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_encoder(written(tmp_path, change(state_of(SPEC))))


def test_a_tensor_beside_the_encoder_that_no_rule_names_is_refused(tmp_path):
    state = {**with_prefix("backbone.", state_of(SPEC)), "neck.weight": np.ones(3, np.float32)}
    with pytest.raises(UserError, match=r"neck\.weight is unexpected"):
        read_encoder(written(tmp_path, state))


def test_a_resnet_of_unknown_depth_is_refused(tmp_path):
    state = state_of({"name": "resnet", "depth": 18})
    for name in [name for name in state if name.startswith("layer3.1.")]:
        del state[name]
    with pytest.raises(UserError, match=r"its groups have \[2, 2, 1, 2\] blocks"):
        read_encoder(written(tmp_path, state))


def test_mean_and_std_are_those_of_timms_config_beside_the_file(tmp_path):
    path = written(tmp_path, state_of(SPEC))
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.4, 0.5]}}))
    found = read_encoder(path)
    assert (found.mean, found.std) == ((0.5, 0.5, 0.5), (0.5, 0.4, 0.5))
    for text in ("{", "[]", '{"pretrained_cfg": {"std": [0.5, 0.5, 0]}}', '{"pretrained_cfg": {"mean": [0.5]}}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json"):
            read_encoder(path)


def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path):
    ran = tmp_path / "ran"

    class Run:
        def __reduce__(self):
            return eval, (f"open({str(ran)!r}, 'w')",)

    for number, value in enumerate((Run(), {"model": Run()}, {"model": {}, "args": Run()})):
        path = tmp_path / f"{number}.pth"
        path.write_bytes(pickle.dumps(value))
        with pytest.raises(UserError, match=r"it uses builtins\.eval"):
            read_encoder(path)
    assert not ran.exists()


def test_a_checkpoint_without_a_state_dict_is_refused(tmp_path):
    torch = require_torch()
    torch.save({"epoch": 3, "weights": {"a": torch.zeros(1)}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds epoch, weights, and no state dict there or at state_dict, model, teacher, student"):
        read_encoder(tmp_path / "a.pth")
