"""Fine-tuning: layer-wise rates, stochastic depth, the classifier of MAE, averaged weights, and encoders of finished runs."""

import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ssl_jax.engine import loop
from ssl_jax.engine.backbone import encoder_model
from ssl_jax.engine.checkpoint import Checkpoints, write_json
from ssl_jax.engine.layer_decay import resnet_layer_decay, vit_layer_decay
from ssl_jax.engine.method import encoder_statistics, encoder_weights, inference_state
from ssl_jax.engine.sharding import leaf_names, match
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.build import build_experiment
from ssl_jax.export.source import find_encoder, make_source
from ssl_jax.methods import build_method
from ssl_jax.models.backbones import resnet, vit
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.common import apply, init_variables
from ssl_jax.models.drop_path import drop_path, rates

ROOT = pathlib.Path(__file__).parent.parent


# ---------------------------------------------------------------- layer-wise rates


def multipliers(rules, spec, size=32):
    """{name: multiplier} of the parameters of an encoder and a classifier."""
    module = build_encoder(spec)
    params = jax.eval_shape(lambda x: init_variables(module, jax.random.key(0), x)[0], jnp.zeros((1, size, size, 3)))
    names = [f"net/{name}" for name in leaf_names({"encoder": params, "classifier": {"kernel": 0, "bias": 0}})]
    return dict(zip(names, match(rules, names, "rules", all_used=True), strict=True))


@pytest.mark.parametrize(
    ("depth", "decay", "golden"),
    [
        (12, 0.65, {0: 0.003697, 1: 0.005688, 6: 0.049022, 12: 0.65}),
        pytest.param(24, 0.75, {0: 0.000753, 1: 0.001003, 6: 0.004228, 24: 0.75}, marks=pytest.mark.full),
    ],
)
def test_layer_decay_has_the_golden_rates_of_mae(depth, decay, golden):
    """Of ids: 0 for patches, class token and positions, i + 1 for block i; the head has 1."""
    by_name = multipliers(vit_layer_decay(depth, decay), dict(name="vit", variant={12: "Ti/16", 24: "L/16"}[depth]))
    for identity, expected in golden.items():
        part = "patch_embed/kernel" if identity == 0 else f"block{identity - 1}/mlp/fc1/kernel"
        assert by_name[f"net/encoder/{part}"] == pytest.approx(expected, abs=6e-7)
    assert by_name["net/encoder/cls_token"] == by_name["net/encoder/pos_embed"] == by_name["net/encoder/patch_embed/bias"]
    assert by_name["net/classifier/kernel"] == by_name["net/encoder/norm/scale"] == 1
    assert len({by_name[f"net/encoder/block{i}/norm1/scale"] for i in range(depth)}) == depth


def test_layer_decay_of_a_resnet_falls_by_stage():
    by_name = multipliers(resnet_layer_decay(0.5), dict(name="resnet", depth=18, width=0.125))
    for stage in range(1, 5):
        found = {rate for name, rate in by_name.items() if f"/layer{stage}_" in name}
        assert found == {0.5 ** (5 - stage)}
    assert by_name["net/encoder/stem_conv/kernel"] == by_name["net/encoder/stem_bn/scale"] == 0.5**5
    assert by_name["net/classifier/bias"] == 1


@pytest.mark.parametrize("decay", [0, 1.5])
def test_layer_decay_out_of_range_is_refused(decay):
    with pytest.raises(UserError, match="must be above 0 and at most 1"):
        vit_layer_decay(12, decay)


# ---------------------------------------------------------------- stochastic depth


def test_drop_path_drops_whole_examples_and_keeps_the_expectation():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3, 2)), jnp.float32)
    out = np.asarray(jax.vmap(lambda key: drop_path(x, 0.3, key))(jax.random.split(jax.random.key(0), 20_000)))
    dropped = (out == 0).all((2, 3))
    np.testing.assert_allclose(out[~dropped], np.broadcast_to(np.asarray(x), out.shape)[~dropped] / 0.7, rtol=1e-6)
    np.testing.assert_allclose(dropped.mean(0), 0.3, atol=0.015)  # each example by itself, five standard errors
    assert np.abs(np.corrcoef(dropped.T) - np.eye(5)).max() < 0.04
    np.testing.assert_allclose(out.mean(0), x, atol=0.03)


def test_rates_of_drop_path_rise_linearly_from_zero():
    np.testing.assert_allclose(rates(0.1, 12), np.linspace(0, 0.1, 12), atol=1e-7)
    np.testing.assert_allclose(rates(0.1, 1), [0])


@pytest.mark.full
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_vit_drops_paths_in_training_only(scan, remat, monkeypatch):
    """Inference is that of the same weights without it; its gradient is zero in a block whose branches are dropped."""
    monkeypatch.setitem(vit.SIZES, "three", vit.Size(16, 3, 2, 32))
    fields = dict(name="vit", variant="three/8", scan=scan, remat=remat)
    plain, dropping = build_encoder(fields), build_encoder({**fields, "drop_path": 0.999999})
    x = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    params, _ = jax.jit(functools.partial(init_variables, plain))(jax.random.key(1), x)
    inference = [apply(module, params, {}, x, False)[0]["pooled"] for module in (plain, dropping)]
    np.testing.assert_array_equal(*inference)

    def loss(params, key):
        return jnp.sum(apply(dropping, params, {}, x, True, key)[0]["pooled"] ** 2)

    grads = jax.jit(jax.grad(loss))(params, jax.random.key(2))
    grads = vit.unstack(grads) if scan else grads
    sizes = [np.abs(grads[f"block{i}"]["mlp"]["fc2"]["kernel"]).max() for i in range(3)]
    assert sizes[0] > 0 and sizes[2] == 0  # rates 0, 1/2 and 1


@pytest.mark.full
def test_resnet_drops_paths_in_training_only():
    """With all branches dropped but the first, a block is the ReLU of its shortcut; batch statistics are updated all the same."""
    fields = dict(name="resnet", depth=18, width=0.0625, stem="cifar", zero_init_residual=False)
    plain, dropping = build_encoder(fields), build_encoder({**fields, "drop_path": 0.999999})
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    params, stats = jax.jit(functools.partial(init_variables, plain))(jax.random.key(1), x)
    again, _ = jax.jit(functools.partial(init_variables, dropping))(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    inference = [apply(module, params, stats, x, False)[0]["pooled"] for module in (plain, dropping)]
    np.testing.assert_array_equal(*inference)
    out, new = jax.jit(lambda key: apply(dropping, params, stats, x, True, key))(jax.random.key(3))
    assert np.abs(out["layer1"]).max() > 0
    kept = np.abs(np.asarray(out["layer4"])).max((1, 2, 3))
    block = resnet.Block(32, 1, False, False, False, False, resnet.KERNEL_INITS["torchvision"], jnp.float32, 0.999999)
    y = jax.random.normal(jax.random.key(4), (2, 3, 3, 32))
    variables = block.init(jax.random.key(5), y, True)
    dropped, _ = block.apply(variables, y, True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(6)})
    np.testing.assert_array_equal(dropped, jnp.maximum(y, 0))
    assert np.isfinite(kept).all()
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, stats, new)
    assert jax.tree.all(moved)


def test_drop_path_is_a_rate():
    for name in ("vit", "resnet"):
        with pytest.raises(UserError, match=f"{name} drop_path 1.0 is no rate"):
            build_encoder(dict(name=name, drop_path=1.0))


# ---------------------------------------------------------------- the method


def method_of(variant, size=32, **changes):
    """(config, method) for images of `size`, without a stage."""
    config = configs.load(f"{ROOT}/configs/supervised.py:{variant}").copy_and_resolve_references()
    with config.unlocked():
        config.data.image_shape, config.data.num_classes, config.dtype = (size, size, 3), 5, "float32"
        config.update_from_flattened_dict(changes)
    return config, build_method(config)


@pytest.mark.full
def test_classifier_of_mae_reads_the_mean_of_the_last_block_through_its_own_norm():
    """Against NumPy in float64; the class token and the normalization of the encoder are left out."""
    _, method = method_of("vit_b16_mae", **{"model.encoder.variant": "mu/16", "views": ((),)})
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    batch = {"image": images, "label": np.arange(3, dtype=np.int32)}
    params, mutable = jax.jit(method.init)(jax.random.key(0), batch, {})
    head = params["net"]["classifier"]
    assert np.std(head["kernel"]) == pytest.approx(2e-5, rel=0.2)  # 160 values
    generator = np.random.default_rng(1)
    head["kernel"] = generator.normal(size=head["kernel"].shape).astype(np.float32)
    head["norm"] = {"scale": generator.normal(size=32).astype(np.float32), "bias": generator.normal(size=32).astype(np.float32)}
    params["net"]["encoder"]["norm"]["scale"] *= 3  # must not matter
    out = jax.jit(method.encode)(params, mutable, images)
    tokens = np.asarray(out["block0"], np.float64)[:, 1:]
    mean = tokens.mean(1)
    normal = (mean - mean.mean(1, keepdims=True)) / np.sqrt(mean.var(1, keepdims=True) + 1e-6)
    expected = (normal * head["norm"]["scale"] + head["norm"]["bias"]) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(out["logits"], expected, atol=2e-4)


@functools.cache
def stage_run():
    """The workdir of a run of configs/simclr.py:smoke at step 0, with weights that differ from the initial ones."""
    exp, workdir = build_experiment(configs.load(f"{ROOT}/configs/simclr.py:smoke"), jax.devices()[:1]), tempfile.mkdtemp()
    saved, state = Checkpoints(pathlib.Path(workdir) / "checkpoints"), exp.run.init()
    saved.save(state._replace(params=jax.tree.map(lambda x: x * 1.01, state.params)), configs.plain(exp.config))
    saved.close()
    write_json(pathlib.Path(workdir) / "config.json", configs.plain(exp.config))
    return workdir


def experiment(*overrides, devices=1):
    given = (f"--config.stages.backbone.workdir={stage_run()}", "--config.batch_size=32", *overrides)
    return build_experiment(configs.load(f"{ROOT}/configs/supervised.py:finetune_smoke", given), jax.devices()[:devices])


def take_steps(exp, state, count):
    history = []
    for batch in loop.to_device(({k: v for k, v in exp.batches[s].items() if k != "_skipped"} for s in range(count)), exp.run.mesh, 1):
        state, metrics = exp.run.step(state, batch, exp.run.root)
        history.append(float(metrics["sup/loss"]))
    return state, history


def unequal(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), a, b)))


@pytest.mark.full
def test_trained_backbone_starts_as_a_copy_and_is_averaged():
    """The first average is a copy; encodings and the exported encoder are those of the averaged weights."""
    exp = experiment("--config.optim.net.warmup=0 steps")
    state = exp.run.init()
    stage = jax.device_get(state.frozen["backbone"])
    start = jax.device_get(state.params["net"])
    jax.tree.map(np.testing.assert_array_equal, start["backbone"], stage["params"]["net"]["encoder"])
    one, first = take_steps(exp, state, 1)
    one = jax.device_get(one)
    assert unequal(one.params["net"]["backbone"], start["backbone"]) > 0
    jax.tree.map(np.testing.assert_array_equal, one.mutable["ema"]["net"], one.params["net"])
    two, losses = take_steps(exp, exp.run.init(), 2)
    two = jax.device_get(two)
    expected = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, one.params["net"], two.params["net"])
    assert unequal(two.mutable["ema"]["net"], expected) < 1e-6 and losses[0] == first[0]
    mutable = inference_state(two)
    found = encoder_weights(exp.method, two.params, mutable)
    jax.tree.map(np.testing.assert_array_equal, found, two.mutable["ema"]["net"]["backbone"])
    stats = encoder_statistics(exp.method, mutable)
    images = exp.batches[0]["image"]
    outputs = exp.encode(two.params, mutable, images)
    encoder = build_encoder(exp.config.stages.backbone.config.model.encoder)
    pooled = apply(encoder, found, stats, images / np.float32(255), False)[0]["pooled"]
    np.testing.assert_allclose(outputs["pooled"], pooled, atol=1e-5)
    assert outputs["logits"].shape == (32, exp.config.data.num_classes)


@pytest.mark.full
def test_export_of_a_fine_tuned_backbone_is_the_averaged_encoder():
    exp = experiment()
    state = jax.device_get(exp.run.init())
    mutable = inference_state(state)
    mutable["ema"] = jax.tree.map(lambda x: x * 0.99, mutable["ema"])
    params, _ = find_encoder(make_source(exp.config, state.params, mutable))
    jax.tree.map(np.testing.assert_array_equal, params, mutable["ema"]["net"]["backbone"])


def test_encoder_of_a_run_on_a_run_on_a_run_is_that_of_the_first():
    first = ConfigDict(dict(model=dict(encoder=dict(name="resnet"), mean=(0.5,) * 3)))
    second = ConfigDict(dict(model=dict(backbone="trained"), stages=dict(backbone=dict(config=first))))
    third = ConfigDict(dict(model=dict(backbone="trained"), stages=dict(backbone=dict(config=second))))
    assert encoder_model(third).encoder.name == "resnet" and encoder_model(first) is first.model


@pytest.mark.full
def test_frozen_backbone_trains_the_classifier_alone():
    exp = experiment("--config.model.backbone=frozen", "--config.model.drop_path=0", "--config.optim.net.lr_multipliers=(('.*',1.0),)")
    state = exp.run.init()
    assert set(state.params["net"]) == {"classifier"} and exp.method.encoder is None
    after, _ = take_steps(exp, state, 2)
    assert after.frozen is state.frozen
    stage = experiment().method  # the same features as those of the run itself
    assert stage.encoder == ("ema", "net", "backbone")
    images = exp.batches[0]["image"]
    run = build_method(exp.config.stages.backbone.config)
    weights = jax.device_get(after.frozen["backbone"])
    expected = jax.jit(run.encode)(weights["params"], weights["mutable"], images)["pooled"]
    np.testing.assert_allclose(exp.encode(after.params, inference_state(after), images)["pooled"], expected, atol=1e-5)


@pytest.mark.full
def test_untrained_backbone_is_that_of_the_first_step():
    exp = experiment("--config.stages.backbone.untrained=True")
    net = jax.device_get(exp.run.init().params["net"]["backbone"])
    trained = jax.device_get(experiment().run.init().params["net"]["backbone"])
    assert unequal(jax.tree.map(lambda x: x * 1.01, net), trained) < 1e-6 < unequal(net, trained)


@pytest.mark.full
def test_fine_tuning_takes_the_same_step_on_eight_devices():
    """Mixup pairs images of different devices, and paths are dropped by the place in the global batch."""
    one, eight = experiment(), experiment("--config.mesh.fsdp=2", devices=8)
    begin = jax.device_get(one.run.init())
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), begin, eight.run.abstract)
    results = [take_steps(exp, state, 3) for exp, state in ((one, one.run.init()), (eight, placed))]
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-4)


@pytest.mark.full
def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"config.model.pool='cls' is unknown; choose pooled or mean_norm"):
        method_of("vit_b16_mae", **{"model.pool": "cls"})
    with pytest.raises(UserError, match=r"mix: mixup=0 and cutmix=0 mix nothing"):
        method_of("vit_b16_mae", **{"model.mix.mixup": 0.0, "model.mix.cutmix": 0.0})
    with pytest.raises(UserError, match=r"leaves no place for config.model.head_layers=1"):
        method_of("vit_b16_mae", **{"model.head_layers": 1})
    _, method = method_of("vit_b16_mae", **{"model.encoder": dict(name="resnet", depth=10, width=0.125)})
    batch = {name: spec.batch(2) for name, spec in method.inputs.items()}
    with pytest.raises(UserError, match=r"pool='mean_norm' needs a ViT, and the encoder has .*layer4"):
        jax.eval_shape(method.init, jax.random.key(0), batch, {})


@pytest.mark.full
def test_stage_and_what_it_cannot_give_are_refused():
    with pytest.raises(UserError, match=r"config.model.drop_path=0.1 needs config.model.backbone='trained'"):
        experiment("--config.model.backbone=frozen")
    with pytest.raises(UserError, match=r"config.model.backbone='half' is unknown; choose frozen or trained"):
        experiment("--config.model.backbone=half")
    with pytest.raises(UserError, match=r"head_layers=1 reads a projection head, which a stage does not give"):
        experiment("--config.model.head_layers=1")
