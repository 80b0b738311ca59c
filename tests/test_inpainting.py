"""The evaluation of painted holes: the harmonic filling against a linear system in float64, and paintings whose errors are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eval_contexts import levels, make_context, smooth, to_floats

from ssl_jax.evals import run as evals
from ssl_jax.evals.kinds import inpainting

HOLE = np.zeros((1, 12, 12), bool)
HOLE[0, 3:9, 4:12] = True  # it touches the border of the image


def test_harmonic_filling_solves_laplaces_equation():
    images = levels(smooth(0, 2))
    found = np.asarray(inpainting.harmonic(jnp.asarray(images, jnp.float32), jnp.asarray(HOLE.repeat(2, 0)), 2000))
    places = np.argwhere(HOLE[0])
    number = {tuple(place): i for i, place in enumerate(places)}
    system = np.zeros((len(places), len(places)))
    for image, filled in zip(images, found, strict=True):
        right, system[:] = np.zeros((len(places), 3)), 0
        for (y, x), i in number.items():
            system[i, i] += 4
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                near = tuple(np.clip(near, 0, 11))
                if near in number:
                    system[i, number[near]] -= 1
                else:
                    right[i] += image[near]
        np.testing.assert_allclose(filled[HOLE[0]], np.linalg.solve(system, right), atol=1e-4)
        np.testing.assert_allclose(filled[~HOLE[0]], image[~HOLE[0]], atol=1e-6)


def test_one_color_is_the_mean_of_what_is_left():
    images = levels(smooth(0, 2))
    found = np.asarray(inpainting.of_one_color(jnp.asarray(images, jnp.float32), jnp.asarray(HOLE.repeat(2, 0))))
    for image, filled in zip(images, found, strict=True):
        np.testing.assert_allclose(filled[HOLE[0]], np.broadcast_to(image[~HOLE[0]].mean(0), (HOLE.sum(), 3)), rtol=1e-5)


def measure(error):
    """Results for paintings that are wrong by `error` at every removed value."""

    @jax.jit
    def inpaint(images):
        true = to_floats(images)
        return {"pictures": jnp.where(HOLE[..., None], true + error, true), "removed": jnp.asarray(HOLE)}

    found = evals.run({"own": {"kind": "inpainting", "examples": 20}}, make_context(smooth(0, 40), inpaint=inpaint))["own"]
    return {name.removeprefix("own/"): value for name, value in found.metrics.items()}, found


def test_only_removed_pixels_count():
    metrics, found = measure(0.125)
    assert metrics["l1"] == pytest.approx(0.125, abs=1e-5) and metrics["mse"] == pytest.approx(0.125**2, rel=1e-4)
    assert metrics["psnr"] == pytest.approx(-20 * np.log10(0.125), abs=1e-3)
    images = levels(smooth(0, 40)[:20])
    mean = np.stack([image[~HOLE[0]].mean(0) for image in images])
    expected = ((images[:, HOLE[0]] - mean[:, None]) ** 2).mean()
    assert metrics["mse_mean"] == pytest.approx(expected, rel=1e-4)
    assert metrics["psnr_harmonic"] == pytest.approx(-10 * np.log10(metrics["mse_harmonic"]))
    assert found.protocol.startswith(f"inpainting of {100 * HOLE.mean():.1f} % of the pixels")
    assert found.picture.shape[0] > 4 * 12 and found.picture.dtype == np.uint8
