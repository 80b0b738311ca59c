"""Health rules: each symptom gives one warning after its patience, healthy metrics none. Spectral norms against known values."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.engine.health import HealthMonitor, spectral_norms

HEALTHY = {
    "d/loss": 1.3, "d/accuracy_real": 0.7, "d/accuracy_fake": 0.99, "d/logit_std": 0.8, "d/diversity": 0.9, "game/code_variance": 0.3,
    "ge/mean_variance": 0.3, "ae/code_deviation": 0.3, "vae/active_units": 3.0, "vqvae/usage_of_batch": 0.4,
    "color/colored": 1.0, "ssl/target_spread": 0.9, "ssl/teacher_entropy": 3.0, "ssl/entropy_of_mean": 5.0, "ssl/target_std": 0.5,
    "d/grad_norm/discriminator": 1.0, "g/grad_norm/generator": 0.1, "judge/accuracy_train": 60.0, "judge/accuracy_test": 55.0,
    "time/slowest_input_process": 0.0, "time/slowest_input_wait": 0.1,
}  # fmt: skip
SICK = [
    ({"d/accuracy_real": 0.99, "d/accuracy_fake": 0.995}, 1000, "the discriminator has won"),
    ({"d/logit_std": 1e-4}, 200, "the discriminator has collapsed"),
    ({"d/diversity": 0.2}, 1000, "the generator collapses"),
    ({"g/grad_norm/generator": 1e-4}, 1000, "the generator no longer learns"),
    ({"game/code_variance": 1e-3}, 1000, "the encoder collapses: the variance"),
    ({"ge/mean_variance": 1e-4}, 1000, "the encoder collapses: the means"),
    ({"time/slowest_input_process": 3.0, "time/slowest_input_wait": 0.83}, 100, "process 3 waits for it 83% of the time"),
    ({"ae/code_deviation": 1e-5}, 1000, "the code collapses"),
    ({"ssl/target_spread": 0.2}, 300, "the embeddings collapse"),
    ({"ssl/teacher_entropy": 0.001, "ssl/entropy_of_mean": 0.002}, 300, "the prototypes collapse"),
    ({"ssl/teacher_entropy": 5.54, "ssl/entropy_of_mean": 5.545}, 300, "the prototypes collapse"),
    ({"ssl/target_std": 1e-4}, 300, "the teacher collapses"),
    ({"vae/active_units": 0.0}, 1000, "the posterior collapses"),
    ({"vqvae/usage_of_batch": 0.02}, 1000, "the codebook collapses"),
    ({"color/colored": 0.0}, 100, "the images are gray"),
    ({"judge/accuracy_train": 98.0}, 0, "memorizes its training images"),
]


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(("change", "patience", "message"), SICK, ids=[message for *_, message in SICK])
def test_each_symptom_warns_once_after_its_patience(change, patience, message, caplog):
    watch = HealthMonitor()
    for step in range(0, patience, 100):
        watch.update(step, {**HEALTHY, **change})
    assert not warnings(caplog)
    for step in range(patience, patience + 500, 100):
        watch.update(step, {**HEALTHY, **change})
    assert len(warnings(caplog)) == 1
    assert message in warnings(caplog)[0]
    assert f"step {patience}:" in warnings(caplog)[0]


@pytest.mark.parametrize(("change", "patience"), [row[:2] for row in SICK[:-1]], ids=[message for *_, message in SICK[:-1]])
def test_healthy_line_restarts_the_patience(change, patience, caplog):
    watch = HealthMonitor()
    for step in range(0, 3 * patience, 100):
        watch.update(step, HEALTHY if step % patience == patience - 100 else {**HEALTHY, **change})
    assert not warnings(caplog)


def test_rules_ignore_metrics_of_other_methods(caplog):
    watch = HealthMonitor()
    for step in range(0, 5000, 100):
        watch.update(step, {"ssl/loss": 3.0, "ssl/grad_norm/net": 1e-9, "knn/top1": 12.0, "classified/accuracy_real": 67.6})
    assert not warnings(caplog)


def test_generator_without_a_loss_does_not_warn(caplog):
    watch = HealthMonitor()
    for step in range(0, 5000, 100):
        watch.update(step, {**HEALTHY, "g/grad_norm/generator": 0.0})
    assert not warnings(caplog)


def test_jump_of_a_spectral_norm_warns(caplog):
    watch = HealthMonitor()
    for step, value in enumerate([0.1, 1.0, 1.1, 1.2, 6.0]):
        watch.update(step, {"spectral_norm/generator": value})
    assert len(warnings(caplog)) == 1
    assert "step 4: spectral_norm/generator jumped from 1.2 to 6" in warnings(caplog)[0]


def test_spectral_norm_of_a_group_is_that_of_its_largest_kernel():
    generator = np.random.default_rng(0)
    u, _ = np.linalg.qr(generator.normal(size=(18, 6)))
    v, _ = np.linalg.qr(generator.normal(size=(6, 6)))
    kernel = (u * [3, 1, 1, 1, 1, 1]) @ v
    params = {"g": {"a": {"kernel": jnp.asarray(kernel.reshape(3, 3, 2, 6), jnp.float32), "bias": jnp.full(6, 99.0)},
                    "b": {"kernel": jnp.eye(4)}}, "d": {"kernel": 2 * jnp.eye(3)}}  # fmt: skip
    norms = jax.device_get(spectral_norms(params))
    assert norms == {"spectral_norm/g": pytest.approx(3, rel=1e-4), "spectral_norm/d": pytest.approx(2, rel=1e-4)}
