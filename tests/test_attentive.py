"""The attentive probe against a loop in float64 and PyTorch's AdamW, and on images that only attention tells apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eval_contexts import make_context
from feature_clouds import mesh_of
from torch_reference import require_torch

from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.evals.kinds import attentive, linear
from ssl_jax.evals.lib.features import Features
from ssl_jax.models.common import create
from ssl_jax.models.heads import AttentiveHead


def marked(seed, count, side=4):
    """Maps [count, side, side, 3] of noise with a marked position, where the second channel tells the class; its mean does not."""
    generator = np.random.default_rng(seed)
    x = generator.integers(60, 196, (count, side, side, 3))
    y = generator.integers(0, 2, count)
    x[..., 0] = 30
    place = generator.integers(0, side, (count, 2))
    rows = np.arange(count)
    x[rows, place[:, 0], place[:, 1], 0] = 255
    x[rows, place[:, 0], place[:, 1], 1] = np.where(y, 180, 76)
    return x.astype(np.uint8), y


@jax.jit
def encode(images):
    x = images / 127.5 - 1
    return {"pooled": x.mean((1, 2)), "layer1": x, "stem": x}


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.mark.full
@pytest.mark.parametrize("width", [128, 48])
def test_head_equals_a_loop(width):
    """Two heads of 64 channels, and a single one where 64 does not divide the width."""
    head, generator = AttentiveHead(3), np.random.default_rng(0)
    x = generator.normal(size=(2, 5, width)).astype(np.float32)
    params, _ = create(head, jax.random.key(0), jnp.asarray(x))
    heads = 2 if width == 128 else 1
    assert params["query"].shape == (heads, width // heads)
    params = jax.tree.map(lambda p: generator.normal(size=p.shape).astype(np.float32) * 0.3, params)
    found = head.apply({"params": params}, x)
    for example in range(2):
        tokens = x[example].astype(np.float64)
        tokens = (tokens - tokens.mean(1, keepdims=True)) / np.sqrt(tokens.var(1, keepdims=True) + 1e-6)
        key, value = (tokens @ params[name]["kernel"] + params[name]["bias"] for name in ("key", "value"))
        pooled = []
        for part in range(heads):
            columns = slice(part * width // heads, (part + 1) * width // heads)
            weights = softmax(key[:, columns] @ params["query"][part] / np.sqrt(width // heads))
            assert weights.sum() == pytest.approx(1)
            pooled.append(weights @ value[:, columns])
        expected = np.concatenate(pooled) @ params["linear"]["kernel"] + params["linear"]["bias"]
        np.testing.assert_allclose(found[example], expected, atol=3e-5)


@pytest.mark.full
def test_steps_of_each_setting_equal_pytorchs_adamw():
    torch = require_torch()
    generator, grid = np.random.default_rng(0), ((1e-2, 0.1), (3e-3, 0.0))
    x, y = generator.normal(size=(12, 4, 6)).astype(np.float32), generator.integers(0, 3, 12).astype(np.int32)
    head = AttentiveHead(3)
    start, _ = create(head, jax.random.key(5), jnp.asarray(x[:1]))
    found = attentive.train(head, Features(x.reshape(12, -1), y), (-1, 6), grid, 3, 4, 5, mesh_of(1))
    for setting, (rate, decay) in enumerate(grid):
        leaves = {jax.tree_util.keystr(p): torch.nn.Parameter(torch.tensor(np.array(v))) for p, v in jax.tree.leaves_with_path(start)}
        biases = [v for k, v in leaves.items() if "bias" in k]
        others = [v for k, v in leaves.items() if "bias" not in k]
        optimizer = torch.optim.AdamW([dict(params=others, weight_decay=decay), dict(params=biases, weight_decay=0)], lr=rate)
        shuffle, done = np.random.default_rng([5, 1]), 0
        for _ in range(3):
            for rows in np.resize(shuffle.permutation(12), (3, 4)):
                for group in optimizer.param_groups:
                    group["lr"] = rate * 0.5 * (1 + np.cos(np.pi * done / 9))
                tokens = torch.nn.functional.layer_norm(torch.from_numpy(x[rows]), (6,), eps=1e-6)
                key, value = (tokens @ leaves[f"['{n}']['kernel']"] + leaves[f"['{n}']['bias']"] for n in ("key", "value"))
                weights = torch.softmax(key @ leaves["['query']"][0] / 6**0.5, 1)
                logits = torch.einsum("bn,bnd->bd", weights, value) @ leaves["['linear']['kernel']"] + leaves["['linear']['bias']"]
                loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y[rows]).long())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
        for path, value in jax.tree.leaves_with_path(found):
            name = jax.tree_util.keystr(path)
            if name == "['key']['bias']":
                continue  # it shifts all scores alike: its gradient is rounding noise, which Adam enlarges
            np.testing.assert_allclose(value[setting], leaves[name].detach().numpy(), atol=3e-4, err_msg=name)


@pytest.mark.full
def test_attention_finds_what_the_mean_hides():
    (train, y_train), (test, y_test) = marked(0, 512), marked(1, 256)
    given = make_context(train, test, encode, {"train": y_train, "test": y_test}, size=64)
    assert linear.evaluate(given, solver="ridge").metrics["top1"] < 70
    result = attentive.evaluate(given, learning_rates=(1e-9, 3e-2), weight_decays=(0.0,), epochs=30, batch_size=64)
    assert result.metrics["top1"] > 90 and result.metrics["validation_top1"] > 85
    assert "lr=0.03 wd=0 chosen of 2 on 10% of train, not refitted" in result.protocol
    assert "layer=layer1 train=train(512) test=test(256)" in result.protocol and "\n" not in result.protocol


@pytest.mark.full
def test_results_do_not_depend_on_the_number_of_devices():
    x, y = marked(2, 40)
    bank, logits = Features(np.float32(x.reshape(40, -1) / 255), y.astype(np.int32)), []
    for devices in (1, 8):
        head = AttentiveHead(2)
        params = attentive.train(head, bank, (-1, 3), ((1e-2, 0.1),), 2, 16, 0, mesh_of(devices))
        logits.append(attentive.predict(head, params, bank.x, (-1, 3), mesh_of(devices)))
    assert logits[0].shape == (40, 1, 2)
    np.testing.assert_allclose(*logits, atol=1e-4)


def test_layer_is_the_last_with_positions():
    def context(*names):
        shapes = {"pooled": (3,), "patches": (2, 2, 3), "block9": (4, 3), "block10": (4, 3), "layer4": (2, 2, 3), "stem": (4, 4, 3)}
        return make_context(marked(0, 8)[0], None, jax.jit(lambda x: {n: jnp.zeros((len(x), *shapes[n])) for n in ("pooled", *names)}))

    for names, expected in ((("block9", "patches"), "patches"), (("block10", "block9"), "block10"), (("layer4", "stem"), "layer4")):
        assert attentive.layer_of(context(*names), "")[0] == expected
    assert attentive.layer_of(context("stem", "layer4"), "stem") == ("stem", (4, 4, 3))
    with pytest.raises(UserError, match="attentive reads maps or tokens, and 'pooled' is none; the model has layer4"):
        evals.check_needs({"one": dict(kind="attentive", maps="pooled")}, context("layer4"))
    with pytest.raises(UserError, match="give maps=NAME; the model has none"):
        evals.check_needs({"one": dict(kind="attentive")}, context())


def test_attentive_refuses_bad_input():
    given = make_context(marked(0, 16)[0], marked(1, 16)[0], encode)
    with pytest.raises(UserError, match=r"attentive probe needs labels"):
        attentive.evaluate(given)
    for option in (dict(epochs=0), dict(learning_rates=(0.0,)), dict(weight_decays=(-1.0,)), dict(validation=1.0)):
        with pytest.raises(UserError, match="must be"):
            evals.check({"one": dict(kind="attentive", **option)})
