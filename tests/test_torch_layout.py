"""ResNet and ViT outputs equal torchvision and timm for the same weights; conversion round trips are exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import require_timm, require_torch, require_torchvision

from ssl_jax.errors import UserError
from ssl_jax.models import common
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.pretrained.torch_layout import from_torch, to_torch

R10 = {"name": "resnet", "depth": 10, "stem": "cifar"}


def randomize(model, seed=0):
    """Random weights and, so that they matter, random norm scales, offsets and running statistics."""
    torch = require_torch()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
                value.copy_(1 + 0.2 * noise.clamp(-3, 3))
            elif value.ndim > 1 and "embed." not in name and "token" not in name and "pos" not in name:
                value.copy_(noise / np.sqrt(np.prod(value.shape[1:])))
            else:
                value.copy_(0.2 * noise)
    return model.eval()


def pixels(size, batch=2):
    return np.random.default_rng(0).random((batch, size, size, 3), np.float32)


def run_ours(spec, state_dict, x):
    variables = from_torch(spec, state_dict)
    out, _ = jax.jit(functools.partial(common.apply, build_encoder(spec), train=False))(*variables, x)
    return variables, out


def run_theirs(function, x):
    torch = require_torch()
    with torch.no_grad():
        return function(torch.from_numpy(x.transpose(0, 3, 1, 2)).contiguous())


def assert_round_trip(spec, variables, state_dict, **arguments):
    state = to_torch(spec, *variables, **arguments)
    assert set(state) == set(state_dict)
    for name, value in state.items():
        expected = state_dict[name].numpy()
        assert value.dtype == expected.dtype
        np.testing.assert_array_equal(value, expected, err_msg=name)


def torchvision_resnet(depth, stem="imagenet"):
    resnet = require_torchvision().models.resnet
    blocks = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]
    model = resnet.ResNet(resnet.Bottleneck if depth == 50 else resnet.BasicBlock, list(blocks))
    nn = require_torch().nn
    model.fc = nn.Identity()
    if stem == "cifar":
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return randomize(model)


@pytest.mark.full
@pytest.mark.parametrize(
    ("spec", "size"),
    [
        ({"depth": 18}, 65),  # odd at every stage
        ({"depth": 50}, 48),
        ({"depth": 18, "stem": "cifar"}, 32),
        ({"depth": 50, "stem": "cifar", "flavor": "simclr"}, 16),
    ],
    ids=str,
)
def test_resnet_equals_torchvision(spec, size):
    spec = {"name": "resnet", **spec}
    model = torchvision_resnet(spec["depth"], spec.get("stem", "imagenet"))
    x = pixels(size)
    variables, ours = run_ours(spec, model.state_dict(), x)

    features = {}
    for name in ("layer1", "layer3"):
        getattr(model, name).register_forward_hook(lambda *args, name=name: features.update({name: args[-1]}))
    pooled = run_theirs(model, x).numpy()
    scale = np.abs(pooled).max()
    np.testing.assert_allclose(ours["pooled"] / scale, pooled / scale, atol=1e-4)
    for name, value in features.items():
        value = value.numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(ours[name] / np.abs(value).max(), value / np.abs(value).max(), atol=1e-4)
    assert_round_trip(spec, variables, model.state_dict())


@pytest.mark.full
def test_training_mode_equals_torchvision_except_unbiased_variance():
    model = torchvision_resnet(10, "cifar")
    x = pixels(8, batch=4)
    variables = from_torch(R10, model.state_dict())
    out, batch_stats = jax.jit(functools.partial(common.apply, build_encoder(R10), train=True))(*variables, x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pooled = run_theirs(model.train(), x).numpy()
    np.testing.assert_allclose(out["pooled"], pooled, atol=1e-4 * np.abs(pooled).max())
    for name, count in (("layer1.0.bn1", 4 * 8 * 8), ("layer3.0.downsample.1", 4 * 2 * 2)):
        ours = to_torch(R10, variables[0], batch_stats)
        theirs = model.state_dict()
        np.testing.assert_allclose(ours[f"{name}.running_mean"], theirs[f"{name}.running_mean"], atol=1e-5)
        old = 0.9 * before[f"{name}.running_var"].numpy()
        unbiased = (ours[f"{name}.running_var"] - old) * count / (count - 1)
        np.testing.assert_allclose(unbiased + old, theirs[f"{name}.running_var"], rtol=1e-4)


MU = {"embed_dim": 32, "depth": 1, "num_heads": 2}  # our size mu
GAP = {"class_token": False, "global_pool": "avg", "fc_norm": False}
REGISTERS = {"reg_tokens": 4, "no_embed_class": True}


@pytest.mark.full
@pytest.mark.parametrize(
    ("spec", "name", "arguments"),
    [
        ({"variant": "S/16"}, "vit_small", {}),
        ({"variant": "Ti/16", "registers": 4}, "vit_tiny", REGISTERS),
        ({"variant": "mu/16", "pool": "gap"}, "vit_tiny", {**MU, **GAP}),
        ({"variant": "mu/16", "pool": "gap", "registers": 4}, "vit_tiny", {**MU, **GAP, **REGISTERS}),
    ],
    ids=["cls", "cls with registers", "gap", "gap with registers"],
)
def test_vit_equals_timm(spec, name, arguments):
    spec = {"name": "vit", **spec}
    model = randomize(require_timm().create_model(f"{name}_patch16_224", img_size=48, num_classes=0, **arguments))
    x = pixels(48)
    variables, ours = run_ours(spec, model.state_dict(), x)
    tokens = run_theirs(model.forward_features, x)
    np.testing.assert_allclose(ours["tokens"], tokens.numpy(), atol=1e-4)
    np.testing.assert_allclose(ours["pooled"], model.forward_head(tokens).detach().numpy(), atol=1e-4)
    np.testing.assert_array_equal(ours["patches"].reshape(2, 9, -1), ours["tokens"][:, -9:])
    assert_round_trip(spec, variables, model.state_dict())


@pytest.mark.full
@pytest.mark.parametrize(("variant", "name"), [("H/14", "vit_huge_patch14_224"), ("g/14", "vit_giant_patch14_224")])
def test_vit_sizes_h_and_g_equal_timm(variant, name):
    torch, timm = require_torch(), require_timm()
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0)
    init = functools.partial(common.init_variables, build_encoder({"name": "vit", "variant": variant}))
    ours, _ = jax.eval_shape(init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    assert sorted(leaf.size for leaf in jax.tree.leaves(ours)) == sorted(p.numel() for p in theirs.parameters())


@pytest.mark.full
def test_learned_positions_are_resized_like_timm():
    timm = require_timm()
    model = randomize(
        timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0, dynamic_img_size=True, **MU)
    )
    spec = {"name": "vit", "variant": "mu/16"}
    params, _ = from_torch(spec, model.state_dict())
    run = jax.jit(functools.partial(common.apply, build_encoder(spec), train=False))
    for height, width in ((32, 48), (96, 96)):
        x = np.random.default_rng(1).random((1, height, width, 3), np.float32)
        ours, _ = run(params, {}, x)
        np.testing.assert_allclose(ours["tokens"], run_theirs(model.forward_features, x).numpy(), atol=1e-4)


def test_sincos_positions_are_exported_as_a_parameter():
    timm = require_timm()
    spec = {"name": "vit", "variant": "mu/16", "position": "sincos2d"}
    x = pixels(32)
    generator = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: generator.normal(0, 0.1, leaf.shape).astype(np.float32), zeros(spec)[0])
    with pytest.raises(UserError, match="pass image_size=PIXELS"):
        to_torch(spec, params, {})
    state = to_torch(spec, params, {}, image_size=32)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **MU).eval()
    model.load_state_dict({name: require_torch().from_numpy(value) for name, value in state.items()})
    back, _ = from_torch(spec, model.state_dict())
    jax.tree.map(np.testing.assert_array_equal, back, params)
    out, _ = jax.jit(functools.partial(common.apply, build_encoder(spec), train=False))(params, {}, x)
    np.testing.assert_allclose(out["tokens"], run_theirs(model.forward_features, x).numpy(), atol=1e-4)
    with pytest.raises(UserError, match="not the fixed sincos2d table"):
        from_torch(spec, {**state, "pos_embed": state["pos_embed"] + 1})


def zeros(spec, size=32):
    init = functools.partial(common.init_variables, build_encoder(spec))
    tree = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), tree)


@pytest.mark.parametrize(("spec", "name"), [(R10, "fc"), ({"name": "vit", "variant": "mu/8"}, "head")])
def test_linear_head_is_exported_as_classifier_and_ignored_on_import(spec, name):
    variables = zeros(spec)
    head = {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)}
    state = to_torch(spec, *variables, head=head)
    np.testing.assert_array_equal(state[f"{name}.weight"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(state[f"{name}.bias"], np.ones(3))
    back = from_torch(spec, state)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    if name == "fc":
        assert state["bn1.num_batches_tracked"].dtype == np.int64


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "mlp"}, "'mlp' has no PyTorch layout"),
        (
            {"name": "resnet", "depth": 50, "flavor": "simclr", "sk": True},
            "no selective-kernel ResNet; train with sk=F",
        ),
        ({"name": "resnet", "depth": 50, "flavor": "simclr"}, "max-pool .* train with flavor='torchvision'"),
        ({"name": "resnet", "flavor": "simclr", "stem": "cifar"}, "shortcut of layer1.0, .* train with flavor="),
    ],
)
def test_encoders_without_pytorch_layout_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        to_torch(spec, {}, {})
    with pytest.raises(UserError, match=message):
        from_torch(spec, {})


def test_state_dicts_that_do_not_fit_are_refused():
    state = to_torch(R10, *zeros(R10))
    odd = {**state, "extra.weight": np.zeros(1), "bn1.weight": np.zeros(3)}
    del odd["layer1.0.conv1.weight"]
    with pytest.raises(UserError) as error:
        from_torch(R10, odd)
    for part in (
        "layer1.0.conv1.weight is missing",
        "bn1.weight has shape [3], not [64]",
        "extra.weight is unexpected",
    ):
        assert part in str(error.value)
    assert "(3 in all)" in str(error.value)
    vit = {"name": "vit", "variant": "mu/8"}
    vit_state = to_torch(vit, *zeros(vit, 16))
    with pytest.raises(UserError, match="5 patch positions, which form no square"):
        from_torch({**vit, "pool": "gap"}, vit_state)
    with pytest.raises(UserError, match="'pos_embed' is missing"):
        from_torch({"name": "vit"}, state)
