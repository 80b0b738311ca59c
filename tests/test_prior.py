"""Transformers over tokens: causality, key-value cache, parameter counts, equality with float64 loops."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ssl_jax.engine.sharding import leaf_names, make_mesh, match, spec_of
from ssl_jax.errors import UserError
from ssl_jax.models.common import create, run
from ssl_jax.models.tokenizers import prior
from ssl_jax.models.tokenizers.prior import CausalPrior, MaskedPrior
from ssl_jax.objectives.tokens import token_nll

T, K, C = 6, 12, 3  # tokens, codes, classes
SIZE = dict(codes=K, length=T, depth=2, width=16, heads=4, hidden=32)


def random_tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(0, K, shape).astype(np.int32)


def perturbed(params, seed=3):
    """Noisy parameters; biases and the head start at 0."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [x + rng.normal(0, 0.3, x.shape).astype(np.float32) for x in leaves])


@pytest.fixture(scope="module")
def causal():
    module = CausalPrior(**SIZE, classes=C)
    return module, perturbed(init_params(module))


@pytest.fixture(scope="module")
def masked():
    module = MaskedPrior(**SIZE, classes=C, null=True)
    return module, perturbed(init_params(module))


@functools.partial(jax.jit, static_argnums=0)
def forward(module, params, tokens, label=None):
    return run(module, params, {}, tokens, label, train=False)[0]


@functools.partial(jax.jit, static_argnums=0)
def init_params(module):
    return create(module, jax.random.key(0), jnp.zeros((2, T), int), train=False)[0]


# ---------------------------------------------------------------- the causal model


@pytest.mark.full
def test_causal_logits_do_not_depend_on_own_or_later_tokens(causal):
    """Exact: all tokens differ, so row s of the embedding is input s + 1 only."""
    module, params = causal
    tokens, mix = jnp.arange(T, dtype=jnp.int32)[None], jax.random.normal(jax.random.key(1), (K,))

    def logits(embedding):
        return forward(module, {**params, "tokens": {"embedding": embedding}}, tokens, jnp.zeros(1, int))[0][0] @ mix

    jacobian = np.abs(jax.jacrev(logits)(params["tokens"]["embedding"])).max(-1)[:, :T]  # [logits of t, token s]
    seen = np.tri(T, k=-1, dtype=bool)
    assert (jacobian[~seen] == 0).all()
    assert (jacobian[seen] > 1e-4).all()


@pytest.mark.full
def test_cached_logits_equal_the_full_forward_pass(causal):
    """With the class token, from every length of prefix."""
    module, params = causal
    tokens, label = random_tokens((2, T)), jnp.arange(1, 3)
    whole = forward(module, params, tokens, label)[0]
    decode = jax.jit(lambda *args: run(module, params, {}, *args, train=False, method="decode")[0])
    prefill = jax.jit(lambda *args: run(module, params, {}, *args, train=False, method="prefill")[0])
    for start in (0, 4):
        logits, cache = prefill(tokens[:, :start], label)
        np.testing.assert_allclose(logits, whole[:, start], atol=2e-5)
        for index in range(start + 1, T):
            logits, cache = decode(tokens[:, index - 1], jnp.int32(index), cache)
            np.testing.assert_allclose(logits, whole[:, index], atol=2e-5)
    assert np.ptp(whole[:, 3], axis=0).max() > 0.1


@pytest.mark.full
def test_initial_nll_per_token_is_log_k():
    module = CausalPrior(**{**SIZE, "codes": 512})
    nll = token_nll(forward(module, init_params(module), random_tokens((2, T)))[0], random_tokens((2, T), 1))
    np.testing.assert_allclose(nll, 6.2383, atol=5e-5)


@pytest.mark.full
def test_missing_label_means_single_mean_or_null_class(causal, masked):
    module, params = causal
    tokens = random_tokens((2, T))
    one = module.clone(classes=1)
    single = {**params, "labels": {"embedding": params["labels"]["embedding"][1:2]}}
    given = forward(module, params, tokens, jnp.full(2, 1))[0]
    for label in (None, jnp.zeros(2, int)):
        np.testing.assert_array_equal(forward(one, single, tokens, label)[0], given)
    table = params["labels"]["embedding"]
    mean = {**params, "labels": {"embedding": jnp.broadcast_to(table.mean(0), table.shape)}}
    np.testing.assert_allclose(forward(module, params, tokens)[0], forward(module, mean, tokens, jnp.zeros(2, int))[0], atol=1e-5)
    module, params = masked
    np.testing.assert_array_equal(forward(module, params, tokens)[0], forward(module, params, tokens, jnp.full(2, C))[0])


@pytest.mark.parametrize(
    ("depth", "width", "heads", "hidden", "count"),
    [(24, 1536, 16, 6144, 706_706_432), (36, 2048, 32, 8192, 1_848_561_664)],
    ids=["VIM-Base", "VIM-Large"],
)
def test_parameter_counts_of_published_models(depth, width, heads, hidden, count):
    """Of the standard block, with a full table of positions and a head of its own, without the table of classes."""
    module = CausalPrior(8192, 1024, depth=depth, width=width, heads=heads, hidden=hidden)
    params = jax.eval_shape(lambda: create(module, jax.random.key(0), jnp.zeros((1, 1024), jnp.int32), train=False)[0])
    assert sum(x.size for x in jax.tree.leaves({k: v for k, v in params.items() if k != "labels"})) == count
    assert params["labels"]["embedding"].shape == (1, width)


# ---------------------------------------------------------------- both, against loops in float64


PLAIN = {"scale": 1.0, "bias": 0.0}


def layer_norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def perceptron(x, p):
    return dense(gelu(dense(x, p["fc1"])), p["fc2"])


def attention(x, p, causal):
    """One position and one head at a time: [N, D] -> [N, D]."""
    heads, size = SIZE["heads"], x.shape[1] // SIZE["heads"]
    qkv, out = dense(x, p["qkv"]).reshape(len(x), heads, 3, size), np.zeros_like(x)
    for h in range(heads):
        q, k, v = qkv[:, h].swapaxes(0, 1)
        for i in range(len(x)):
            there = slice(0, i + 1 if causal else len(x))
            w = np.exp(k[there] @ q[i] / math.sqrt(size))
            out[i, h * size : (h + 1) * size] = w @ v[there] / w.sum()
    return dense(out, p["proj"])


def blocks(x, params, causal):
    """Returns (the last output, features of the input and of each block)."""
    features = [(layer_norm(x, PLAIN) if causal else x).mean(0)]
    for i in range(SIZE["depth"]):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        mlp = functools.partial(perceptron, p=p["mlp"])
        if causal:
            x = x + attention(layer_norm(x, p["norm1"]), p["attention"], causal)
            x = x + mlp(layer_norm(x, p["norm2"]))
        else:
            x = layer_norm(x + attention(x, p["attention"], causal), p["norm1"])
            x = layer_norm(x + mlp(x), p["norm2"])
        features.append((layer_norm(x, PLAIN) if causal else x).mean(0))
    return x, np.array(features)


def in_float64(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def test_causal_prior_equals_float64_loop(causal):
    module, params = causal
    p, tokens = in_float64(params), random_tokens((2, T))
    x = np.concatenate([p["labels"]["embedding"][[2]], p["tokens"]["embedding"][tokens[0, :-1]]]) + p["position"]
    x, features = blocks(x, p, causal=True)
    logits, found = forward(module, params, tokens, jnp.full(2, 2))
    np.testing.assert_allclose(logits[0], dense(layer_norm(x, p["norm"]), p["head"]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[:, 0], features, rtol=1e-4, atol=1e-4)


def test_masked_prior_equals_float64_loop(masked):
    """Also that its output weights are the input's, without a row for the mask."""
    module, params = masked
    p, tokens = in_float64(params), random_tokens((2, T))
    tokens[0, [1, 4]] = K
    x = np.concatenate([p["labels"]["embedding"][[2]], p["tokens"]["embedding"][tokens[0]]]) + p["position"]
    x, features = blocks(layer_norm(x, p["norm"]), p, causal=False)
    x = layer_norm(gelu(dense(x[1:], p["transform"])), p["transform_norm"])
    logits, found = forward(module, params, tokens, jnp.full(2, 2))
    assert p["tokens"]["embedding"].shape == (K + 1, SIZE["width"])
    np.testing.assert_allclose(logits[0], x @ p["tokens"]["embedding"][:K].T + p["bias"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[:, 0], features, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- dropout, memory, types, devices


@pytest.mark.full
def test_dropout_depends_on_its_key_and_keeps_the_mean(causal):
    x = jnp.ones((400, 300))
    y = prior.dropout(x, 0.1, jax.random.key(0))
    assert set(np.unique(y)) == {0, np.float32(1 / 0.9)}
    assert abs(float(y.mean()) - 1) < 4 * math.sqrt(0.1 / 0.9 / x.size)
    assert prior.dropout(x, 0.1, None) is x
    module, params = causal
    train = jax.jit(lambda key: run(module, params, {}, random_tokens((2, T)), None, key, train=True)[0][0])
    np.testing.assert_array_equal(train(jax.random.key(1)), train(jax.random.key(1)))
    assert np.abs(train(jax.random.key(1)) - train(jax.random.key(2))).max() > 0.01


@pytest.mark.full
def test_remat_keeps_gradients(causal):
    module, params = causal

    def loss(params, remat):
        logits, _ = run(module.clone(remat=remat), params, {}, random_tokens((2, T)), train=False)[0]
        return token_nll(logits, random_tokens((2, T), 1)).mean()

    found, products = {}, {}
    for remat in ("none", "dots", "full"):
        traced = jax.jit(jax.grad(functools.partial(loss, remat=remat))).trace(params)
        products[remat] = str(traced.jaxpr).count("dot_general[")
        if remat != "dots":
            found[remat] = traced.lower().compile()(params)
    assert products["none"] < products["dots"] < products["full"]  # products of two activations are recomputed under 'dots' too
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found["full"], found["none"])


def test_logits_and_features_are_float32_in_bfloat16_models(causal):
    module, params = causal
    half = module.clone(dtype=jnp.bfloat16)
    logits, features = forward(half, params, random_tokens((2, T)))
    assert logits.dtype == features.dtype == jnp.float32
    np.testing.assert_allclose(logits, forward(module, params, random_tokens((2, T)))[0], atol=0.3)
    logits, cache = jax.eval_shape(lambda: run(half, params, {}, random_tokens((2, 1)), train=False, method="prefill")[0])
    assert (logits.dtype, cache.key.dtype, cache.key.shape) == (jnp.float32, jnp.bfloat16, (2, 2, 4, T, 4))


@pytest.mark.full
def test_tensor_sharding_rules_match_and_keep_outputs(causal):
    module, params = causal
    mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
    names = leaf_names(params)
    rules = (*prior.TENSOR_RULES, (".*", "fsdp"))
    shardings = [NamedSharding(mesh, spec_of(rule, x.shape, mesh, name))
             for rule, x, name in zip(match(rules, names, "test"), jax.tree.leaves(params), names, strict=True)]  # fmt: skip
    assert {"data", "fsdp", "tensor"} - {axis for s in shardings for axis in s.spec} == {"data"}
    sharded = jax.device_put(params, jax.tree.unflatten(jax.tree.structure(params), shardings))
    tokens = random_tokens((4, T))
    with jax.set_mesh(mesh):
        sharded_forward = jax.jit(lambda p, t: forward(module, p, t)[0])
        batch = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
        text = sharded_forward.lower(sharded, batch).as_text()
        np.testing.assert_allclose(sharded_forward(sharded, batch), forward(module, params, tokens)[0], atol=2e-5)
    assert len(re.findall("sharding_constraint", text)) == 2  # embedded tokens, a block


def test_invalid_fields_raise_user_error():
    for field, value, message in (("heads", 5, "do not divide"), ("dropout", 1.0, "below 1"), ("remat", "some", "choose one of none")):
        with pytest.raises(UserError, match=message):
            CausalPrior(**{**SIZE, field: value})
