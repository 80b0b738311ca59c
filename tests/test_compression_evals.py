"""Evaluations of tokens, layers, factors and classes against closed forms and loops, on one and eight devices."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eval_contexts import make_context, means, smooth, to_floats
from feature_clouds import blobs, mesh_of

from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.evals.context import Context
from ssl_jax.evals.kinds import (
    codebook,
    disentanglement,
    linear,
    linear_by_layer,
    sample_class_accuracy,
    token_likelihood,
)
from ssl_jax.evals.lib import factors as measures
from ssl_jax.evals.lib import linear_maps, linear_probe
from ssl_jax.evals.lib.features import grid_side, pool_to_grid
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.build import build_experiment
from ssl_jax.experiment.contexts import model_context, open_eval
from ssl_jax.experiment.sampler import open_labels
from ssl_jax.models.backbones.encoders import ENCODERS, build_encoder
from ssl_jax.models.common import create, run

ROOT = pathlib.Path(__file__).parent.parent


# --- tokens


def test_codebook_usage_and_perplexity_in_closed_form():
    assert codebook.entropy(np.bincount([0, 1, 2, 3] * 5)) == pytest.approx(2)
    assert codebook.entropy(codebook.histogram(np.zeros((3, 2), int), 9)) == 0
    np.testing.assert_array_equal(codebook.histogram(np.array([[1, 1], [3, 0]]), 5), [1, 2, 0, 1, 0])
    assert codebook.used(np.array([1, 1, 3]), 8) == 25
    assert codebook.uniform_perplexity(1024, 8192) == pytest.approx(941.1, abs=0.1)
    assert codebook.uniform_perplexity(10**7, 64) == pytest.approx(64, rel=1e-4)
    assert codebook.uniform_perplexity(1, 64) == pytest.approx(1)
    by_hand = np.mean([codebook.entropy(np.bincount([a, b, c], minlength=2)) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
    assert codebook.uniform_perplexity(3, 2) == pytest.approx(2**by_hand)


def test_codebook_plot_shows_unused_codes_in_gray():
    def grays(counts):
        return np.all(codebook.plot(np.array(counts)) == [211, 211, 211], axis=-1).sum()  # 'lightgrey'

    half, whole = grays([9, 0, 0, 4]), grays([9, 1, 1, 4])
    assert whole < half / 10
    np.testing.assert_allclose(grays([0, 0, 0, 4]), 1.5 * half, rtol=0.05)


def test_codebook_reports_three_definitions_of_usage(monkeypatch):
    monkeypatch.setattr(codebook, "BATCH", 8)
    monkeypatch.setattr(codebook, "RECENT", 12)
    numbers = np.random.default_rng(0).integers(0, 20, (21, 2, 2))
    images = np.repeat(numbers[..., None], 3, -1).astype(np.uint8)
    given = make_context(images, tokens=jax.jit(lambda x: x[..., 0].astype(jnp.int32)), codes=32)
    metrics, protocol, picture = codebook.evaluate(given)
    assert (picture.dtype, picture.ndim, picture.shape[-1]) == (np.uint8, 3, 3)
    batches = [len(np.unique(numbers[a : a + 8])) / 32 for a in (0, 8)]  # the last five images are no full batch
    assert metrics["usage_batch"] == pytest.approx(100 * np.mean(batches))
    assert metrics["usage_recent"] == pytest.approx(100 * len(np.unique(numbers.ravel()[-12:])) / 32)
    assert metrics["usage"] == pytest.approx(100 * len(np.unique(numbers)) / 32)
    assert metrics["perplexity"] == pytest.approx(2 ** metrics["entropy"])
    assert 0 < metrics["perplexity"] < metrics["usage"] * 0.32 + 1e-9
    assert protocol == "codebook of 32 codes, 4 tokens an image, test(21); usage_batch of 2 x 8 images, usage_recent of 12 tokens"
    uniform = np.random.default_rng(1).integers(0, 32, (500, 2, 2))
    even = make_context(np.repeat(uniform[..., None], 3, -1).astype(np.uint8), tokens=given.model.fns.tokens, codes=32)
    assert codebook.evaluate(even).metrics["perplexity_share"] == pytest.approx(100, abs=1)


def test_token_baselines_are_cross_entropies_of_training_frequencies():
    generator = np.random.default_rng(0)
    train, held_out = (generator.integers(0, 3, (n, 4)) + np.array([0, 3, 0, 3]) for n in (60, 25))
    unigram, position, strength = token_likelihood.baselines(train, held_out)
    codes = max(train.max(), held_out.max()) + 1
    p = np.array([(np.sum(train == c) + 1) / (train.size + codes) for c in range(codes)])
    unigram_bits, position_bits = [], []
    for row in held_out:
        for t, token in enumerate(row):
            unigram_bits.append(-np.log2(p[token]))
            position_bits.append(-np.log2((np.sum(train[:, t] == token) + strength * p[token]) / (60 + strength)))
    assert (unigram, position) == pytest.approx((np.mean(unigram_bits), np.mean(position_bits)))
    assert strength in token_likelihood.STRENGTHS and np.log2(3) < position < 1.75 < unigram
    noise = np.random.default_rng(1).integers(0, 50, (200, 40))  # positions have no information: strong smoothing
    assert token_likelihood.baselines(noise, noise)[2] >= 100


def test_token_likelihood_on_held_out_tokens_of_a_conditional_prior():
    tokens = {split: np.random.default_rng(i).integers(0, 4, (n, 2, 2)) for i, (split, n) in enumerate((("train", 50), ("test", 30)))}
    images = {split: np.repeat(t[..., None], 3, -1).astype(np.uint8) for split, t in tokens.items()}
    labels = {split: np.arange(len(t)) % 5 for split, t in tokens.items()}

    @jax.jit
    def token_nll(images, labels):
        return {"nll": jnp.log(2.0) * labels, "tokens": images[..., 0].reshape(len(images), -1).astype(jnp.int32)}

    given = make_context(images["train"], images["test"], labels=labels, token_nll=token_nll)
    metrics, protocol, _ = token_likelihood.evaluate(given, examples=40)
    assert metrics["bits_per_token"] == pytest.approx(2 / 4)  # labels 0 to 4 are bits of an image
    assert metrics["nats"] == pytest.approx(2 * np.log(2))
    expected = token_likelihood.baselines(tokens["train"][:40].reshape(40, 4), tokens["test"].reshape(30, 4))[:2]
    assert (metrics["bits_unigram"], metrics["bits_position"]) == pytest.approx(expected)
    assert metrics["gain"] == pytest.approx(expected[1] - 0.5)
    assert "4 tokens an image, held-out test(30), frequencies of train(40)" in protocol
    given.opened.clear()
    token_likelihood.evaluate(given, examples=40)
    assert given.opened == ["test"]


# --- layers


def test_linear_by_layer_probes_all_layers_in_one_pass_and_chooses_on_train():
    features = {split: blobs(n, seed=seed) for split, n, seed in (("train", 300, 0), ("test", 200, 1))}
    images = {split: f.x.reshape(-1, 4, 4, 1) for split, f in features.items()}
    labels = {split: f.y for split, f in features.items()}

    @jax.jit
    def encode(x):
        rows = x.reshape(len(x), -1)
        tokens = jnp.stack([rows[:, :10] - 1, rows[:, :10] + 1], 1)  # averaged over space
        return {"pooled": rows, "block1": rows[:, :2], "block2": rows, "block10": tokens, "embedding": rows[:, :1], "head": rows[:, :1]}

    given = make_context(images["train"], images["test"], encode, labels, size=100)
    evals.check_needs({"one": dict(kind="linear_by_layer")}, given)
    given.opened.clear()
    assert list(linear_by_layer.matching_layers(given, linear_by_layer.LAYERS)) == ["embedding", "block1", "block2", "block10"]
    metrics, protocol, _ = linear_by_layer.evaluate(given, layers=r"block\d+", solver="ridge")
    assert given.opened == ["train", "test"]
    assert [name for name in metrics if name.startswith("block")] == ["block1_top1", "block2_top1", "block10_top1"]
    for name in ("block1", "block2", "block10"):
        assert metrics[f"{name}_top1"] == pytest.approx(linear.evaluate(given, solver="ridge", layer=name).metrics["top1"], abs=0.6)
    assert metrics["best_layer"] == 2 and metrics["best_top1"] == metrics["block2_top1"] > metrics["block1_top1"]
    assert "ridge of 3 layers" in protocol and "train=train(300) test=test(200)" in protocol
    assert linear_by_layer.groups({"a": 5, "b": 4, "c": 3, "d": 9}, 8) == [["a"], ["b", "c"], ["d"]]
    with pytest.raises(UserError, match=r"no layer fits layers='stage\\\\d'; the encoder has block1, block10, block2, embedding"):
        linear_by_layer.prepare(given, layers=r"stage\d")


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("shape", [(3, 13, 13, 8), (2, 2, 9, 4)])
@pytest.mark.full
def test_layers_are_pooled_to_a_grid_as_by_adaptive_pools(largest, shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = jax.jit(pool_to_grid, static_argnums=(1, 2))(x, 4 * 4 * shape[-1] + 3, largest)
    rows, columns = (min(4, side) for side in shape[1:3])
    expected = np.zeros((shape[0], rows, columns, shape[-1]))
    for i in range(rows):
        for j in range(columns):
            cell = x[
                :,
                math.floor(i * shape[1] / rows) : math.ceil((i + 1) * shape[1] / rows),
                math.floor(j * shape[2] / columns) : math.ceil((j + 1) * shape[2] / columns),
            ]
            expected[:, i, j] = cell.max((1, 2)) if largest else cell.astype(np.float64).mean((1, 2))
    np.testing.assert_allclose(found, expected.reshape(shape[0], -1), atol=1e-6)
    torch = pytest.importorskip("torch", reason="parity test: pip install -r requirements-reference.txt")
    pool = torch.nn.AdaptiveMaxPool2d if largest else torch.nn.AdaptiveAvgPool2d
    theirs = pool((rows, columns))(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, theirs.reshape(shape[0], -1), atol=1e-6)


def test_features_that_are_no_maps_or_need_one_cell_are_pooled_over_space():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 5)), jnp.float32)
    for most in (0, 5, 19):
        np.testing.assert_allclose(pool_to_grid(x, most), x.mean((1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(pool_to_grid(x[:, 0], 9600, True), x[:, 0].max(1))
    np.testing.assert_array_equal(pool_to_grid(x[:, 0, 0], 9600), x[:, 0, 0])
    np.testing.assert_array_equal(pool_to_grid(x, 9600), x.reshape(2, -1))  # never enlarged


@pytest.mark.parametrize(
    ("maps", "grids"),
    [
        (((55, 96), (27, 256), (13, 384), (13, 384), (13, 256)), (10, 6, 5, 5, 6)),  # Zhang et al., Caffe's AlexNet
        (((55, 64), (27, 192), (13, 384), (13, 256), (13, 256)), (12, 7, 5, 6, 6)),  # RotNet
        (((112, 64), (56, 256), (28, 512), (14, 1024), (7, 2048)), (12, 6, 4, 3, 2)),  # ResNet-50 in VISSL
    ],
)
def test_9600_numbers_give_the_published_grids(maps, grids):
    assert [grid_side((1, side, side, channels), 9600) for side, channels in maps] == [(side, side) for side in grids]


@pytest.mark.full
def test_linear_by_layer_in_the_protocol_of_colorization():
    """Maps in which only the place of a bright pixel tells the class; channels of very different scales and offsets."""
    generator = np.random.default_rng(0)
    labels = {split: generator.integers(0, 4, n) for split, n in (("train", 240), ("test", 120))}
    images = {}
    for split, y in labels.items():
        x = generator.integers(0, 90, (len(y), 8, 8, 1))
        x[np.arange(len(y)), 1 + 4 * (y // 2), 2 + 4 * (y % 2)] = 255
        images[split] = x.astype(np.uint8)

    @jax.jit
    def encode(x):
        x = x / 255.0
        return {"conv1": jnp.concatenate([x, 1e-3 * x + 5], -1), "conv2_1": x[:, ::2, ::2], "pooled": x.mean((1, 2))}

    given = make_context(images["train"], images["test"], encode, labels, size=100)
    plain, protocol, _ = linear_by_layer.evaluate(given, solver="ridge")
    assert list(plain)[:2] == ["conv1_top1", "conv2_1_top1"]
    assert plain["conv1_top1"] < 50 and "standardized frozen features without augmentation" in protocol
    options = dict(features=2 * 2 * 2 + 1, pooling="max", normalization="channel", solver="ridge")
    metrics, protocol, _ = linear_by_layer.evaluate(given, **options)
    assert metrics["conv1_top1"] == 100
    assert "standardized by channel (BatchNorm without scale and offset), frozen features max-pooled to at most 9 numbers" in protocol

    def by_hand(split):
        x = images[split].reshape(-1, 2, 4, 2, 4).max((2, 4)) / 255.0
        return np.stack([x, 1e-3 * x + 5], -1)

    mean, std = by_hand("train").mean((0, 1, 2)), by_hand("train").std((0, 1, 2))
    assert std[0] / std[1] == pytest.approx(1000, rel=1e-3)
    found = {name: parts for name, *parts in linear_by_layer._features(given, {"conv1": 8}, 9, True)}
    bank, query, channels = found["conv1"]
    bank, query = linear_by_layer.by_channel(bank, query, channels)
    for features, split in ((bank, "train"), (query, "test")):
        expected = ((by_hand(split) - mean) / std).reshape(len(images[split]), -1)
        np.testing.assert_allclose(features.x, expected, atol=2e-3)  # the second channel is 5 in float32
    fitted = linear_probe.fit(bank, "ridge", standardize=False)
    top1 = 100 * np.mean(linear_probe.predict(fitted.probe, query.x)[:, 0].argmax(1) == labels["test"])
    assert metrics["conv1_top1"] == pytest.approx(top1)
    unscaled = linear_by_layer.evaluate(given, **{**options, "normalization": "none"}).protocol
    assert "2 layers, unscaled frozen features max-pooled" in unscaled


ENCODERS_SMALL = {
    "alexnet": (dict(width=0.25, conv1=(5, 1, 2)), ["conv1", "conv2", "conv3", "conv4", "conv5"]),
    "nin": (dict(width=0.125), ["block1", "block2", "block3", "block4"]),
    "vgg": (dict(width=0.125), [f"conv{g}_{i}" for g in range(1, 6) for i in range(1, 3 if g < 3 else 4)]),
    "resnet": (dict(depth=10, width=0.25, stem="cifar"), ["layer1", "layer2", "layer3", "layer4"]),
    "resnet_v2": (dict(depth=10, width=0.25, stem="cifar", groups=3), ["layer1", "layer2", "layer3"]),
    "revnet": (dict(depth=10, width=1 / 32, stem="stride2"), ["layer1", "layer2", "layer3", "layer4"]),
    "vit": (dict(variant="mu/8"), ["block0"]),
    "mlp": (dict(widths=(8, 4)), ["layer1", "layer2"]),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_has_layers_by_name_from_input_to_output(name):
    fields, layers = ENCODERS_SMALL[name]
    module = build_encoder({"name": name, **fields})

    def encode(images):
        x = images / 255.0
        params, state = create(module, jax.random.key(0), x)
        return run(module, params, state, x, train=False)[0]

    given = make_context(np.zeros((2, 32, 32, 3), np.uint8), encode=encode, size=2)
    found = linear_by_layer.matching_layers(given, linear_by_layer.LAYERS, 9600)
    assert list(found) == layers
    assert all(0 < width <= 9600 for width in found.values())
    names = linear_by_layer.matching_layers(given, "|".join([layers[-1], layers[0]]), 9600)
    assert list(names) == list(dict.fromkeys([layers[0], layers[-1]]))


# --- factors of variation


def cloud(count, seed):
    """Five independent factors: one categorical, one with six levels, three continuous."""
    generator = np.random.default_rng(seed)
    return {
        "shape": generator.integers(0, 4, count),
        "scale": generator.integers(0, 6, count) / 5.0,
        **{name: generator.uniform(-1, 1, count) for name in ("x", "y", "angle")},
    }


@pytest.fixture(scope="module")
def clouds():
    train, test = cloud(2500, 0), cloud(1200, 1)
    factors = [measures.factor(train[name], test[name]) for name in train]
    code = [np.stack(list(values.values()), 1).astype(np.float64) for values in (train, test)]
    return code, factors


def test_continuous_factors_are_binned_at_quantiles_and_categories_are_not(clouds):
    _, factors = clouds
    assert [(f.count, f.ordered) for f in factors] == [(4, False), (6, True), (10, True), (10, True), (10, True)]
    np.testing.assert_array_equal(np.bincount(factors[2].train), np.full(10, 250))
    names = measures.factor(np.array([7, 7, 3]), np.array([3, 5]))
    np.testing.assert_array_equal(names.train, [2, 2, 0])
    np.testing.assert_array_equal(names.test, [0, 1])


def test_disentanglement_scores_of_perfect_permuted_noise_and_rotated_codes(clouds):
    (train, test), factors = clouds
    turned = [np.array([-3.0, 1, 0.5, -1, 3]) * x[:, [3, 1, 0, 4, 2]] for x in (train, test)]
    values = [f.train for f in factors]
    for code in ((train, test), turned):
        assert measures.mutual_information_gap(code[0], values) > 0.93  # 20 bins of codes and 10 of factors do not align
        scores = measures.dci(*code, factors, False, 0)
        assert scores["disentanglement"] > 0.95 and scores["completeness"] > 0.95
        assert scores["informativeness"] > 0.75
        assert measures.factorvae(*code, factors, 0) > 0.99
    discrete = [values[0], values[1]]
    assert measures.mutual_information_gap(train[:, :2], discrete) == pytest.approx(1, abs=0.01)  # exact up to chance
    assert measures.factorvae(np.ones((50, 3)), np.ones((50, 3)), factors, 0) == 0  # a collapsed code
    noise = [np.random.default_rng(i).standard_normal(x.shape) for i, x in enumerate((train, test))]
    assert measures.mutual_information_gap(noise[0], values) < 0.01
    none = measures.dci(*noise, factors, False, 0)
    assert none["disentanglement"] < 0.35 and none["completeness"] < 0.35 and none["informativeness"] < 0.25
    assert measures.factorvae(*noise, factors, 0) < 0.35
    mixing = np.linalg.qr(np.random.default_rng(0).standard_normal((5, 5)))[0]
    std = train.std(0)
    rotated = [x / std @ mixing for x in (train, test)]
    assert measures.mutual_information_gap(rotated[0], values) < 0.3
    assert measures.dci(*rotated, factors, False, 0)["disentanglement"] < 0.6


@pytest.mark.parametrize("kind", ["int", "float", "ordered"])
def test_dci_with_lasso_of_the_ideal_code_is_one_for_whole_numbers_and_floats(kind):
    """The code is the factors: whole numbers as names of classes, the same as floats, and declared to be ordered."""
    generator = np.random.default_rng(0)
    train, test = (np.stack([generator.integers(0, count, n) for count in (4, 10, 8)], 1) for n in (3000, 500))
    dtype, ordered = (float if kind == "float" else int), (True if kind == "ordered" else None)
    factors = [measures.factor(*(x[:, i].astype(dtype) for x in (train, test)), ordered) for i in range(3)]
    assert [f.ordered for f in factors] == [kind != "int"] * 3
    noise = [generator.standard_normal((len(x), 2)) for x in (train, test)]
    for code in ((train, test), [np.concatenate([-x, more], 1) for x, more in zip((train, test), noise, strict=True)]):
        scores = measures.dci(*(x.astype(np.float64) for x in code), factors, False, 0)
        assert scores == pytest.approx(dict(disentanglement=1, completeness=1, informativeness=1), abs=0.01)


def test_dci_with_lasso_of_a_one_hot_code_of_classes():
    """Classes without an order: each dimension belongs to one factor, but the factor has several dimensions."""
    generator = np.random.default_rng(0)
    train, test = (np.stack([generator.integers(0, count, n) for count in (5, 6)], 1) for n in (3000, 500))
    code = [np.concatenate([np.eye(5)[x[:, 0]], x[:, 1:]], 1) for x in (train, test)]
    factors = [measures.factor(train[:, i], test[:, i]) for i in range(2)]
    scores = measures.dci(*code, factors, False, 0)
    assert scores["disentanglement"] > 0.99 and scores["informativeness"] > 0.99
    assert scores["completeness"] < 0.8


def test_dci_with_boosted_trees_finds_the_factors(clouds):
    (train, test), factors = clouds
    rows, few = slice(0, 300), [factors[0], factors[1]]
    few = [f._replace(train=f.train[rows]) for f in few]
    scores = measures.dci(train[rows, :3], test[:, :3], few, True, 0)
    assert scores["disentanglement"] > 0.99 and scores["completeness"] > 0.99 and scores["informativeness"] == 1


def test_mutual_information_and_concentration_in_closed_form():
    a, b = np.repeat([0, 1], 50), np.tile([0, 1], 50)
    assert measures.mutual_information(a, b) == pytest.approx(0, abs=1e-12)
    assert measures.mutual_information(a, a) == pytest.approx(np.log(2))
    assert measures.mutual_information(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2])) == pytest.approx(np.log(2))
    assert measures.concentration(np.eye(3)) == 1
    assert measures.concentration(np.ones((2, 4))) == pytest.approx(0, abs=1e-12)
    assert measures.concentration(np.array([[3.0, 0], [0.5, 0.5]])) == pytest.approx(0.75)
    assert measures.concentration(np.zeros((2, 2))) == 0


def test_disentanglement_reads_factors_and_reports_a_shuffled_baseline():
    values = {split: cloud(n, seed) for split, n, seed in (("train", 900, 0), ("test", 400, 1))}
    images = {split: np.stack(list(v.values()), 1)[:, None, None].astype(np.float32) for split, v in values.items()}
    columns = {
        split: {"shape": x["shape"], "pose": np.stack([x["x"], x["y"]], 1).astype(np.float32)} for split, x in values.items()
    }
    encode = jax.jit(lambda x: {"code": x.reshape(len(x), -1)})
    given = make_context(images["train"], images["test"], encode, columns=columns)
    disentanglement.prepare(given, factors=("shape", "pose"))
    metrics, protocol, _ = disentanglement.evaluate(given, factors=("shape", "pose"), examples=600)
    assert metrics["mig"] > 0.85 and metrics["disentanglement"] > 0.9 and metrics["factorvae"] > 0.97
    assert metrics["mig_shuffled"] < 0.05 and metrics["factorvae_shuffled"] < 0.6
    assert metrics["informativeness"] > metrics["informativeness_shuffled"] + 0.3
    assert protocol == (
        "disentanglement layer=code D=5 factors shape (4), pose[0] (10 bins), pose[1] (10 bins); importance of lasso, of L1 logistic"
        " regression for classes seed=0"
        " train=train(600) test=test(300)"
    )


# --- samples of a class


@pytest.mark.full
def test_sample_class_accuracy_counts_samples_of_another_class():
    generator = np.random.default_rng(0)
    colors = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])

    def painted(labels):
        return np.clip(colors[labels][:, None, None] + 30 * generator.standard_normal((len(labels), 6, 6, 3)), 0, 255).astype(np.uint8)

    labels = {split: generator.integers(0, 3, n) for split, n in (("train", 90), ("test", 40))}
    requested = generator.integers(0, 3, 50)
    fake = painted(np.where(np.arange(50) < 10, (requested + 1) % 3, requested))  # ten show another class

    def samples(count, seed, truncation):
        yield from (fake[start : min(start + 16, count)] for start in range(0, count, 16))

    given = make_context(
        painted(labels["train"]), painted(labels["test"]), None, labels,
        samples=samples, sampled_labels=lambda count, seed: requested[:count], extractor=means,
    )  # fmt: skip
    metrics, protocol, _ = sample_class_accuracy.evaluate(given, extractor="means", examples=50)
    assert metrics == pytest.approx({"accuracy": 80, "accuracy_real": 100, "chance": 100 / 3})
    assert "extractor=means weights=ffffffff resize=legacy pixels=6x6 of train(90), fake=50 seed=0 real=test(40)" in protocol
    given.opened.clear()
    assert sample_class_accuracy.evaluate(given, extractor="means", examples=50).metrics == metrics and given.opened == []


# --- all together


@pytest.mark.full
def test_evaluations_on_one_and_eight_devices_agree_under_the_transfer_guard():
    train, test = smooth(0, 60, 6), smooth(1, 40, 6)
    labels = {"train": np.arange(60) % 3, "test": np.arange(40) % 3}
    half = jax.jit(lambda x: jnp.float32(0.5) + 0 * to_floats(x))
    functions = dict(
        reconstruct=half,
        tokens=jax.jit(lambda x: (x[..., 0] // 16).astype(jnp.int32)), codes=16,
        token_nll=jax.jit(lambda x, y: {"nll": y * 1.0, "tokens": (x[..., 0] // 16).reshape(len(x), -1).astype(jnp.int32)}),
    )  # fmt: skip
    encode = jax.jit(lambda x: {"code": x[:, 0, 0] / 255.0, "layer1": x[:, 0, 0] / 255.0})
    spec = {
        "reconstruction": dict(kind="reconstruction"), "reduction": dict(kind="pca_baseline"), "codebook": dict(kind="codebook"),
        "denoising": dict(kind="denoising", components=3), "prior": dict(kind="token_likelihood"),
        "depth": dict(kind="linear_by_layer", solver="ridge"),
    }  # fmt: skip
    results = []
    for devices in (1, 8):
        with jax.transfer_guard("disallow"):
            results.append(evals.run(spec, make_context(train, test, encode, labels, mesh=mesh_of(devices), **functions)))
    assert set(results[0]) == set(spec)
    for label in spec:
        assert results[0][label].protocol == results[1][label].protocol and "\n" not in results[0][label].protocol
        assert results[0][label].metrics == pytest.approx(results[1][label].metrics, rel=1e-4, abs=1e-4)
        assert all(type(value) is float and np.isfinite(value) for value in results[0][label].metrics.values())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (dict(kind="likelihood", k=0), "k=0"),
        (dict(kind="denoising", sigma=0.0), "sigma=0.0 must be above 0"),
        (dict(kind="codebook", examples=0), "examples=0"),
        (dict(kind="token_likelihood", examples=1), "examples=1"),
        (dict(kind="pca_baseline", examples=10), "examples=10 must be above 10"),
        (dict(kind="linear_by_layer", layers="("), "no regular expression"),
        (dict(kind="linear_by_layer", solver="adam"), "'adam'.*choose one of"),
        (dict(kind="disentanglement", factors=()), "factors=\\(\\) must not be empty"),
        (dict(kind="sample_class_accuracy", examples=0), "examples=0"),
    ],
)
def test_invalid_options_raise_before_anything_runs(entry, message):
    with pytest.raises(UserError, match=message) as error:
        evals.check({"one": entry})
    assert "\n" not in str(error.value)


def test_missing_model_functions_raise_and_the_pixel_baseline_skips_them():
    images = smooth(0, 16, 6)
    for kind in ("likelihood", "codebook", "token_likelihood", "pca_baseline", "denoising", "sample_class_accuracy"):
        with pytest.raises(UserError, match=f"evals.one: kind='{kind}' needs a method that gives "):
            evals.check_needs({"one": dict(kind=kind)}, make_context(images))
    with pytest.raises(UserError, match="no layer fits"):
        evals.check_needs({"one": dict(kind="linear_by_layer")}, make_context(images))
    with pytest.raises(UserError, match="the code 'code' does not exist; the encoder has pooled"):
        evals.check_needs({"one": dict(kind="pca_baseline")}, make_context(images, reconstruct=to_floats))
    with pytest.raises(UserError, match=r"has 108 numbers, no fewer than a picture of 6x6"):
        evals.check_needs({"one": dict(kind="pca_baseline", layer="pooled")}, make_context(images, reconstruct=to_floats))
    with pytest.raises(UserError, match=r"at most 20 numbers; leave it out"):
        linear_maps.picture_size(make_context(images, reconstruct=to_floats), 20)
    with pytest.raises(UserError, match=r"of the size of images, \(6, 6\), and they are \(3, 6\)"):
        evals.check_needs({"one": dict(kind="denoising")}, make_context(images, reconstruct=jax.jit(lambda x: x[:, :3] / 255.0)))
    pixels = Context(jax.jit(lambda x: {"pooled": x[:, 0, 0]}), lambda split: iter(()))
    spec = {"a": dict(kind="linear_by_layer"), "b": dict(kind="disentanglement"), "c": dict(kind="codebook")}
    assert evals.run(spec, pixels) == {}


# --- contexts of runs


@pytest.mark.full
def test_context_of_a_run_has_the_functions_of_its_method_and_the_factors_of_its_data():
    small = ("--config.data.train_split=train[:96]", "--config.data.test_split=test[:70]", "--config.eval_batch_size=32")
    config = configs.load(f"{ROOT}/configs/bigan.py:smoke", small)
    experiment = build_experiment(config)
    opened = model_context(experiment, experiment.run.abstract)  # nothing is computed here
    values = disentanglement.values(opened, "test", ("label", "pose"), 70)
    assert list(values) == ["label", "pose[0]", "pose[1]", "pose[2]", "pose[3]"]
    labels = np.concatenate([b["label"][b["_valid"]] for b in open_eval(config, "test")])
    np.testing.assert_array_equal(values["label"], labels)
    assert values["pose[3]"].dtype == np.float32 and len(values["pose[3]"]) == 70
    with pytest.raises(UserError, match="has no feature 'color'"):
        disentanglement.prepare(opened, factors=("color",))
    with pytest.raises(UserError, match="the data have no shape; choose other factors"):
        disentanglement.prepare(make_context(smooth(0, 4)), factors=("shape",))
    with pytest.raises(UserError, match="'question' of the data is no number"):
        disentanglement.prepare(opened, factors=("question",))
    assert jax.eval_shape(opened.model.fns.reconstruct, opened.images()).shape == (32, *opened.images().shape[1:])
    assert opened.model.fns.log_prob is opened.model.fns.tokens is opened.model.codes is opened.model.sampled_labels is None


@pytest.mark.full
def test_sampled_labels_equal_the_labels_of_the_latents():
    config = configs.load(f"{ROOT}/configs/biggan.py:smoke", ("--config.eval_batch_size=32",))
    experiment = build_experiment(config)
    labels = open_labels(experiment)(70, 5)
    expected = [np.asarray(experiment.method.sampler.latents(jax.random.key(5 + (i << 20)), 32)["label"]) for i in range(3)]
    np.testing.assert_array_equal(labels, np.concatenate(expected)[:70])
    assert len(np.unique(labels)) > 3
