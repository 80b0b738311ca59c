"""Power laws of a comparison: exponents, their intervals, and the section of the page."""

import numpy as np
import pytest
from scipy import stats
from test_compare import page_of, write_sweep

from ssl_jax.errors import UserError
from ssl_jax.report.compare.power_law import fit


def test_exact_law_of_two_quantities_is_found():
    width, images = np.meshgrid([0.125, 0.25, 0.5], [1e4, 1e5, 1e6])
    law = fit({"width": width.ravel(), "images": images.ravel()}, (70 * width**-0.1 * images**-0.25).ravel())
    np.testing.assert_allclose((law.factor, *law.exponents.values(), law.r2), (70, 0.1, 0.25, 1), rtol=1e-6)
    assert law.n == 9
    for name, (low, high) in law.intervals.items():
        assert low == pytest.approx(law.exponents[name], abs=1e-6) == high


def test_one_quantity_agrees_with_linregress_of_scipy():
    rng = np.random.default_rng(0)
    x = np.repeat([1.0, 4.0, 16.0, 64.0], 3)
    errors = 50 * x**-0.3 * np.exp(0.1 * rng.standard_normal(12))
    law, line = fit({"x": x}, errors), stats.linregress(np.log(x), np.log(errors))
    half = stats.t.ppf(0.975, 10) * line.stderr
    expected = (-line.slope, line.rvalue**2, np.exp(line.intercept))
    np.testing.assert_allclose((law.exponents["x"], law.r2, law.factor), expected, rtol=1e-6)
    np.testing.assert_allclose(law.intervals["x"], (-line.slope - half, -line.slope + half), rtol=1e-5)


def test_intervals_cover_the_true_exponent_in_95_percent_of_cases():
    rng = np.random.default_rng(1)
    x = np.repeat([1.0, 3.0, 9.0], 3)
    laws = [fit({"x": x}, 10 * x**-0.5 * np.exp(0.2 * rng.standard_normal(9))) for _ in range(400)]
    assert np.mean([law.intervals["x"].low < 0.5 < law.intervals["x"].high for law in laws]) == pytest.approx(0.95, abs=0.03)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    numbers = {f"t{i}": tuple(100 - 40 * i**-0.5 - seed for seed in range(3)) for i in (1, 2, 3)}
    return write_sweep(tmp_path_factory.mktemp("sweeps") / "scale", numbers)


def test_page_has_the_law_of_each_metric(scaled, tmp_path):
    _, page = page_of([scaled], tmp_path, quantities=["model.temperature"])
    for expected in ("Power laws", "exponent of model.temperature", "100 - knn/top1", "curve_fit", "0.4"):
        assert expected in page.text, expected
    assert "Power laws" not in page_of([scaled], tmp_path)[1].text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["color"], "'color' is neither a varied key nor one of images, flops, device_seconds; give model.temperature"),
        (["images"], "images has less than 3 different positive values"),
    ],
)
def test_a_quantity_that_cannot_be_fitted_is_one_line(scaled, tmp_path, names, message):
    with pytest.raises(UserError, match=message):
        page_of([scaled], tmp_path, quantities=names)
