"""The FLOPs that a rehearsal counts for published recipes, against closed forms of all forward and backward passes."""

import itertools

import jax
import pytest

from ssl_jax.data.pipeline import iterate
from ssl_jax.engine.loop import to_device
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.abstract import build_abstract
from ssl_jax.experiment.build import build_experiment
from ssl_jax.experiment.training import step_flops
from ssl_jax.rehearsal import flops

ROOT = __file__.rsplit("/", 2)[0]


def counted(name, *overrides):
    """(FLOPs per example without rematerialization, FLOPs per example that it repeats)."""
    config = configs.load(f"{ROOT}/configs/{name}", ("--config.batch_size=64", "--config.mesh.fsdp=1", *overrides))
    config.mesh.data = -1
    exp = build_abstract(config, jax.devices()[:8], "tpu")
    found = flops.count(exp.run.trace(exp.run.abstract, exp.example, exp.run.root).jaxpr)
    return (found.flops - found.repeated) / 64, found.repeated / 64


def transformer(depth, width, hidden, tokens):
    """Forward FLOPs: four square matrices, the MLP, and two products of tokens with tokens."""
    return depth * (2 * tokens * width * (4 * width + 2 * hidden) + 4 * tokens**2 * width)


@pytest.mark.full
def test_flops_of_simclr_resnet50():
    """Two views, three times 4.09 GMACs each (torchvision's count)."""
    assert counted("simclr.py:imagenet")[0] == pytest.approx(2 * 3 * 2 * 4.09e9, rel=0.05)


@pytest.mark.full
def test_flops_of_vit_g14():
    blocks = transformer(40, 1408, 6144, 257)
    plain, repeated = counted("supervised.py:imagenet_vit_g14")
    assert plain == pytest.approx(3 * (blocks + 2 * 256 * 1408 * 3 * 14**2), rel=0.05)
    assert 0.6 * blocks < repeated < blocks  # the forward pass again, without its last products


@pytest.mark.full
def test_flops_of_vim_large(monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes of stages are relative paths
    blocks, head = transformer(36, 2048, 8192, 1024), 2 * 1024 * 2048 * 8192
    tokenizer = transformer(8, 512, 2048, 1024)  # its encoder, forward only
    plain, _ = counted("vq_prior.py:imagenet256_large")
    assert plain == pytest.approx(3 * (blocks + head) + tokenizer, rel=0.05)


def non_local(channels, pixels):
    """Forward FLOPs of a non-local block: queries and keys have 1/8 of the channels, values 1/2; pixels attend to 1/4 of them."""
    projections = channels * (2 * channels // 8 + channels // 2 + channels // 2)
    return 2 * pixels * (projections + pixels // 4 * (channels // 8 + channels // 2))


@pytest.mark.full
def test_flops_of_biggan_128():
    """Two discriminator updates, each with half of the batch and as many fakes, and one generator update with half of the batch."""
    ch = 96
    generator, size = non_local(2 * ch, 64**2) + 2 * 9 * ch * 3 * 128**2, 8
    for inputs, outputs in itertools.pairwise((16 * ch, 16 * ch, 8 * ch, 4 * ch, 2 * ch, ch)):
        generator += 2 * size**2 * (9 * inputs * outputs + 9 * outputs**2 + inputs * outputs / 4)
        size *= 2
    discriminator, size = non_local(ch, 64**2), 128
    for inputs, outputs in itertools.pairwise((3, ch, 2 * ch, 4 * ch, 8 * ch, 16 * ch)):
        discriminator += 2 * size**2 * (9 * inputs * outputs + 9 * outputs**2 + inputs * outputs / 4)
        size //= 2
    discriminator += 2 * size**2 * 2 * 9 * (16 * ch) ** 2
    step = generator + 2 * 3 * discriminator + (3 * generator + 2 * discriminator) / 2
    plain, repeated = counted("biggan.py:imagenet128", "--config.model.orthogonal=0.0")  # its FLOPs do not depend on the batch
    assert plain == pytest.approx(step, rel=0.05)
    assert repeated == 0


@pytest.mark.full
def test_a_run_counts_the_flops_of_its_step_without_a_second_trace(caplog):
    experiment = build_experiment(configs.load(f"{ROOT}/configs/simclr.py:smoke"))
    run, state = experiment.run, experiment.run.init()
    batch = next(to_device(iterate(experiment.batches, 0, 1, 0), run.mesh))
    with jax.log_compiles():
        assert step_flops(experiment) > 0
        with jax.transfer_guard("disallow"):
            run.step(state, batch, run.root)
    assert len([line for line in caplog.messages if line.startswith("Finished tracing step ")]) == 1
    assert any(line.startswith("Compiling jit(step)") for line in caplog.messages)
