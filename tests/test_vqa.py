"""Visual question answering: encoders of questions, FiLM, stacked attention, and the method's loss."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssl_jax.engine.method import Method, Spec, Stage, State, inference_state
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.methods import vqa
from ssl_jax.models.common import create, run
from ssl_jax.models.tasks.vqa import (
    BagOfWords,
    Film,
    GruQuestion,
    StackedAttention,
    modulate,
    places_of_maxima,
    with_coordinates,
)

QUESTION = np.array([[3, 5, 2, 0, 0, 0], [4, 1, 0, 0, 0, 0], [2, 3, 4, 5, 6, 7]], np.int32)
SIZES = {"question": 8, "answer": 5}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def randomized(params, seed=0):
    """Every parameter random, so that no layer that starts at zero hides another."""
    leaves, tree = jax.tree.flatten(params)
    draw = np.random.default_rng(seed).standard_normal
    return jax.tree.unflatten(tree, [0.5 * draw(x.shape).astype(np.float32) for x in leaves])


def float64(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


# --- questions


@pytest.mark.full
def test_gru_gives_the_state_after_the_last_word():
    module = GruQuestion(8, embedding=3, width=4)
    params = randomized(create(module, jax.random.key(0), QUESTION)[0])
    found, _ = run(module, params, {}, QUESTION, train=True)
    p = float64(params)
    cell = p["rnn"]["cell"] if "rnn" in p else p["cell"]

    def dense(name, x):
        return x @ cell[name]["kernel"] + cell[name].get("bias", 0)

    for row, tokens in enumerate(QUESTION):
        h = np.zeros(4)
        for x in p["embed"]["embedding"][tokens[tokens > 0]]:
            r, z = (sigmoid(dense(f"i{gate}", x) + dense(f"h{gate}", h)) for gate in "rz")
            n = np.tanh(dense("in", x) + r * dense("hn", h))
            h = (1 - z) * n + z * h
        np.testing.assert_allclose(found[row], h, rtol=1e-5, atol=1e-6)


@pytest.mark.full
def test_gru_equals_torch_gru():
    torch = pytest.importorskip("torch")
    module = GruQuestion(8, embedding=3, width=4)
    params = randomized(create(module, jax.random.key(0), QUESTION)[0], 1)
    cell = params["rnn"]["cell"] if "rnn" in params else params["cell"]
    theirs = torch.nn.GRU(3, 4, batch_first=True)
    kernels = [np.concatenate([cell[f"{side}{gate}"]["kernel"] for gate in "rzn"], 1).T for side in "ih"]
    inner = np.concatenate([np.zeros(8, np.float32), cell["hn"]["bias"]])
    biases = [np.concatenate([cell[f"i{gate}"]["bias"] for gate in "rzn"]), inner]
    with torch.no_grad():
        for name, value in zip(("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"), kernels + biases, strict=True):
            getattr(theirs, name).copy_(torch.from_numpy(np.array(value)))
        for row, tokens in enumerate(QUESTION):
            words = np.asarray(params["embed"]["embedding"])[tokens[tokens > 0]]
            _, last = theirs(torch.from_numpy(words)[None])
            found, _ = run(module, params, {}, QUESTION[row : row + 1], train=False)
            np.testing.assert_allclose(found[0], last[0, 0].numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.full
def test_bag_of_words_is_the_mean_of_the_words_that_are_there():
    module = BagOfWords(8, embedding=3, width=4)
    params = randomized(create(module, jax.random.key(0), QUESTION)[0])
    found, _ = run(module, params, {}, QUESTION, train=False)
    p = float64(params)
    mean = np.stack([p["embed"]["embedding"][tokens[tokens > 0]].mean(0) for tokens in QUESTION])
    np.testing.assert_allclose(found, np.maximum(mean @ p["linear"]["kernel"] + p["linear"]["bias"], 0), rtol=1e-5, atol=1e-6)
    turned, _ = run(module, params, {}, QUESTION[2:, ::-1], train=False)
    np.testing.assert_allclose(turned, found[2:], rtol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("module", [GruQuestion(8, 3, 4), BagOfWords(8, 3, 4)], ids=["gru", "bag of words"])
def test_padding_tokens_change_nothing(module):
    params = randomized(create(module, jax.random.key(0), QUESTION)[0])
    short, longer = (run(module, params, {}, np.pad(QUESTION, ((0, 0), (0, n))), train=False)[0] for n in (0, 5))
    np.testing.assert_allclose(longer, short, rtol=1e-6)
    embedding = params["embed"]["embedding"]
    changed = {**params, "embed": {"embedding": np.concatenate([np.full((1, 3), 9, np.float32), embedding[1:]])}}
    np.testing.assert_array_equal(run(module, changed, {}, QUESTION, train=False)[0], short)
    empty, _ = run(module, params, {}, np.zeros((2, 6), np.int32), train=False)  # rows that fill a batch
    assert np.isfinite(empty).all()


# --- FiLM


def test_film_with_gamma_1_and_beta_0_is_the_identity():
    x = np.random.default_rng(0).standard_normal((2, 3, 3, 4)).astype(np.float32)
    zeros = np.zeros((2, 1, 1, 4), np.float32)
    np.testing.assert_array_equal(modulate(x, zeros, zeros), x)
    np.testing.assert_allclose(modulate(x, zeros + 1, zeros + 3), 2 * x + 3, rtol=1e-6)


def film(train=False, **changes):
    """(module, parameters, statistics, maps, questions)"""
    draw = np.random.default_rng(1).standard_normal
    maps, question = (draw(shape).astype(np.float32) for shape in ((4, 3, 5, 6), (4, 7)))
    module = Film(5, **{**dict(width=8, blocks=2, projection=9, hidden=10), **changes})
    params, state = create(module, jax.random.key(0), maps, question)
    return module, randomized(params), state, maps, question


@pytest.mark.full
def test_question_acts_on_a_film_network_by_gamma_and_beta_only():
    module, params, state, maps, question = film()
    logits, _ = run(module, params, state, maps, question, train=False)[0]
    other, _ = run(module, params, state, maps, question[::-1], train=False)[0]
    assert np.abs(logits - other).max() > 1e-2
    still = {**params, "film": jax.tree.map(np.zeros_like, params["film"])}
    ours, theirs = (run(module, still, state, maps, q, train=False)[0][0] for q in (question, question[::-1]))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.full
def test_film_network_equals_a_float64_loop():
    module, params, state, maps, question = film(blocks=1)
    (logits, attention), _ = run(module, params, state, maps, question, train=True)
    p = float64(params)

    def conv(name, x, size):
        padded = np.pad(x, ((0, 0), *[(size // 2, size // 2)] * 2, (0, 0)))
        rows, columns = x.shape[1:3]
        kernel = p[name]["kernel"]
        out = sum(padded[:, a : a + rows, b : b + columns] @ kernel[a, b] for a in range(size) for b in range(size))
        return out + p[name].get("bias", 0)

    def norm(x, scale=1.0, bias=0.0):
        axes = tuple(range(x.ndim - 1))
        return (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5) * scale + bias

    def with_places(x):
        y, z = np.meshgrid(np.linspace(-1, 1, x.shape[1]), np.linspace(-1, 1, x.shape[2]), indexing="ij")
        return np.concatenate([x, np.broadcast_to(np.stack([y, z], -1), (*x.shape[:3], 2))], -1)

    def relu(x):
        return np.maximum(x, 0)

    x = relu(norm(conv("stem", maps.astype(np.float64), 3), p["stem_bn"]["scale"], p["stem_bn"]["bias"]))
    x = relu(conv("block0_in", with_places(x), 1))
    gamma, beta = np.split(question @ p["film"]["kernel"] + p["film"]["bias"], 2, axis=1)
    x = x + relu((1 + gamma[:, None, None]) * norm(conv("block0_conv", x, 3)) + beta[:, None, None])
    x = relu(conv("projection", with_places(x), 1))
    h = relu(norm(x.max((1, 2)) @ p["hidden"]["kernel"], p["hidden_bn"]["scale"], p["hidden_bn"]["bias"]))
    np.testing.assert_allclose(logits, h @ p["answers"]["kernel"] + p["answers"]["bias"], rtol=1e-3, atol=1e-4)
    expected = np.zeros(x.shape[:3])
    for image in range(len(x)):
        for channel in range(x.shape[-1]):
            most = x[image, ..., channel] == x[image, ..., channel].max()
            expected[image] += most / most.sum() / x.shape[-1]
    np.testing.assert_allclose(attention, expected, atol=1e-6)


def test_coordinates_go_from_minus_one_to_one():
    found = np.asarray(with_coordinates(jnp.zeros((1, 3, 2, 1))))[0]
    np.testing.assert_array_equal(found[..., 1], [[-1, -1], [0, 0], [1, 1]])
    np.testing.assert_array_equal(found[..., 2], [[-1, 1]] * 3)
    assert np.asarray(with_coordinates(jnp.ones((1, 1, 1, 1))))[0, 0, 0].tolist() == [1, 0, 0]


def test_places_of_maxima_share_equal_values():
    x = np.zeros((1, 2, 2, 3), np.float32)
    x[0, 0, 1, 0] = 2  # one channel is largest there, one is the same everywhere, one has two largest places
    x[0, :, 0, 2] = 1
    np.testing.assert_allclose(places_of_maxima(x)[0], np.array([[0.25 + 0.5, 1.25], [0.75, 0.25]]) / 3, rtol=1e-6)


# --- stacked attention


@pytest.mark.full
def test_stacked_attention_equals_a_float64_loop():
    draw = np.random.default_rng(2).standard_normal
    maps, question = (draw(shape).astype(np.float32) for shape in ((4, 3, 5, 6), (4, 7)))
    module = StackedAttention(5, width=8, attended=9, hops=2, hidden=10)
    params = randomized(create(module, jax.random.key(0), maps, question)[0])
    (logits, attention), _ = run(module, params, {}, maps, question, train=False)
    p = float64(params)

    def linear(name, x):
        return x @ p[name]["kernel"] + p[name].get("bias", 0)

    places, query = linear("places", maps.reshape(4, 15, 6).astype(np.float64)), linear("query", question.astype(np.float64))
    for hop in range(2):
        h = np.tanh(linear(f"hop{hop}_places", places) + linear(f"hop{hop}_query", query)[:, None])
        weights = softmax(linear(f"hop{hop}_scores", h)[..., 0])
        query = query + np.einsum("bn,bnc->bc", weights, places)
    np.testing.assert_allclose(attention, weights.reshape(4, 3, 5), rtol=1e-4, atol=1e-6)
    expected = linear("answers", np.maximum(linear("hidden", query), 0))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


# --- the method


def encode(params, mutable, images):
    """Maps of the mean colors of a grid of 4 x 4 squares."""
    x = images.astype(jnp.float32) / (255 if images.dtype == jnp.uint8 else 1)
    maps = x.reshape(len(x), 4, x.shape[1] // 4, 4, x.shape[2] // 4, 3).mean((2, 4))
    return {"maps": maps * params["net"]["scale"], "pooled": maps.mean((1, 2))}


COLORS = Method(
    {"image": Spec((16, 16, 3))}, lambda key, batch, frozen: ({"net": {"scale": jnp.ones(())}}, {}), phases=(), encode=encode
)
FROZEN = {"backbone": {"params": {"net": {"scale": jnp.ones(())}}, "mutable": {}}}


def method(fusion, image="read", **overrides):
    config = configs.load("configs/vqa.py:smoke").copy_and_resolve_references()
    with config.unlocked():
        config.data.image_shape, config.dtype = (16, 16, 3), "float32"
        config.data.vocabulary, config.model.layer, config.model.image = SIZES, "maps", image
        config.model.question.length = 6
        if fusion == "attention":
            config.model.fusion = dict(name="attention", width=32, attended=16, hops=2, hidden=64)
        config.update_from_flattened_dict(overrides)
    return vqa.build(config, {"backbone": Stage(types.SimpleNamespace(method="colors", model={}), COLORS)})


def batch_of(count=12, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 7, (count, 1))
    return {
        "image": rng.integers(0, 256, (count, 16, 16, 3), np.uint8),
        "question": np.where(np.arange(6) < lengths, rng.integers(1, 8, (count, 6)), 0).astype(np.int32),
        "answer": rng.integers(0, 5, count).astype(np.int32),
    }


def begin(built, batch):
    params, mutable = built.init(jax.random.key(0), batch, FROZEN)
    return State(jnp.int32(0), {"net": randomized(params["net"])}, {}, mutable, FROZEN)


@pytest.mark.full
@pytest.mark.parametrize("fusion", ["film", "attention"])
def test_attention_sums_to_one_and_padding_changes_no_answer(fusion):
    built, batch = method(fusion), batch_of()
    state = begin(built, batch)
    found = built.fns.answer(state.params, inference_state(state), batch)
    assert found["attention"].shape == (12, 4, 4) and (np.asarray(found["attention"]) >= 0).all()
    np.testing.assert_allclose(found["attention"].sum((1, 2)), 1, rtol=1e-5)
    longer = {**batch, "question": np.pad(batch["question"], ((0, 0), (0, 3)))}
    again = built.fns.answer(state.params, inference_state(state), longer)
    np.testing.assert_allclose(again["logits"], found["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.full
def test_loss_equals_a_float64_loop():
    built, batch = method("attention"), batch_of()  # without BatchNorm, so the same in training
    state = begin(built, batch)
    value, (mutable, metrics) = built.phases[0].loss(state.params, state, batch, jax.random.key(0))
    logits = np.asarray(built.fns.answer(state.params, inference_state(state), batch)["logits"], np.float64)
    expected = -np.mean([np.log(softmax(row)[answer]) for row, answer in zip(logits, batch["answer"], strict=True)])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(logits.argmax(1) == batch["answer"]), rtol=1e-6)
    assert set(mutable["batch_stats"]) == set(state.mutable["batch_stats"])


@pytest.mark.full
@pytest.mark.parametrize("fusion", ["film", "attention"])
def test_question_only_model_sees_no_image(fusion):
    batch = batch_of()
    other = {**batch, "image": batch["image"][::-1]}
    for image, same in (("none", True), ("read", False)):
        built = method(fusion, image)
        state = begin(built, batch)
        ours, theirs = (built.fns.answer(state.params, inference_state(state), b)["logits"] for b in (batch, other))
        assert np.array_equal(ours, theirs) == same


def test_wrong_configs_are_one_line():
    for changes, message in (
        ({"model.image": "blank"}, "config.model.image='blank' is unknown; choose read or none"),
        ({"model.layer": "layer9"}, "config.model.layer='layer9' is no map of the backbone"),
        ({"model.question.name": "lstm"}, "config.model.question.name has no 'lstm'"),
        ({"model.fusion.name": "sum"}, "config.model.fusion.name has no 'sum'"),
        ({"data.vocabulary": {"question": 8}}, "'vqa' reads 'answer' by its vocabulary; give --config.data.vocabulary.answer=None"),
        ({"data.vocabulary": {"question": 8, "answer": 1}}, "the train split has one answer only"),
    ):
        with pytest.raises(UserError, match=message):
            begin(method("film", **changes), batch_of())


@pytest.mark.full
@pytest.mark.parametrize("fusion", ["film", "attention"])
def test_model_learns_what_only_the_image_tells_and_the_question_only_model_does_not(fusion):
    """One of two questions about an image with a random color: is it bright (3), is it red (4); both answers are equally frequent."""
    rng = np.random.default_rng(0)
    bright, red, kind = rng.integers(0, 2, (3, 512))
    image = np.zeros((512, 16, 16, 3), np.uint8) + (40 + 120 * bright[:, None, None, None]).astype(np.uint8)
    image[..., 0] += (90 * red[:, None, None]).astype(np.uint8)
    question = np.pad(np.stack([3 + kind, np.full(512, 2)], 1), ((0, 0), (0, 4))).astype(np.int32)
    batch = {"image": image, "question": question, "answer": np.where(kind, red, bright).astype(np.int32)}
    accuracies = {}
    for shown in ("read", "none"):
        built = method(fusion, shown)
        params, mutable = built.init(jax.random.key(0), batch, FROZEN)
        optimizer = optax.adam(1e-2)

        @jax.jit
        def step(state, opt, built=built, optimizer=optimizer):
            (_, (mutable, logs)), grads = jax.value_and_grad(built.phases[0].loss, has_aux=True)(state.params, state, batch, None)
            updates, opt = optimizer.update(grads, opt)
            return state._replace(params=optax.apply_updates(state.params, updates), mutable=mutable), opt, logs["accuracy"]

        state, opt = State(jnp.int32(0), params, {}, mutable, FROZEN), optimizer.init(params)
        for _ in range(300):
            state, opt, accuracy = step(state, opt)
        accuracies[shown] = float(accuracy)
    assert accuracies["read"] > 0.97 and accuracies["none"] < 0.6, accuracies
