"""Durations of a config: units, exact fractions, rounding to steps, and one-line errors."""

import pytest

from ssl_jax.engine.durations import Duration, parse, to_steps
from ssl_jax.errors import UserError


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("200 steps", 200, "steps"),
        ("10_000 steps", 10_000, "steps"),
        ("1 step", 1, "steps"),
        ("10k steps", 10_000, "steps"),
        ("45 epochs", 45, "epochs"),
        ("45.0 epochs", 45, "epochs"),
        ("1 epoch", 1, "epochs"),
        (".5 epochs", 0.5, "epochs"),
        ("1e-2 epochs", 0.01, "epochs"),
        ("3M examples", 3_000_000, "examples"),
        ("2.5 M examples", 2_500_000, "examples"),
        (" 1.5B  examples ", 1_500_000_000, "examples"),
        ("0 steps", 0, "steps"),
    ],
)
def test_duration_formats(text, amount, unit):
    found = parse(text, "config.total")
    assert (float(found.amount), found.unit) == (amount, unit)
    assert parse(str(found), "config.total") == found


def test_amounts_are_exact_fractions():
    """As binary fractions 0.1 + 0.2 is not 0.3."""
    assert parse("0.1 epochs", "x").amount + parse("0.2 epochs", "x").amount == parse("0.3 epochs", "x").amount
    assert str(Duration(parse("0.3 epochs", "x").amount, "epochs")) == "0.3 epochs"


@pytest.mark.parametrize(
    ("text", "steps", "steps_up"),
    [
        ("8 steps", 8, 8),
        ("2 epochs", 56, 57),  # of 7200 / 256 = 28.125 steps
        ("45 epochs", 1265, 1266),
        ("0.001 epochs", 0, 1),
        ("1000 examples", 3, 4),
        ("1024 examples", 4, 4),
        ("7.2k examples", 28, 29),
        ("0 epochs", 0, 0),
    ],
)
def test_durations_round_down_and_intervals_round_up(text, steps, steps_up):
    """7,200 examples in batches of 256."""
    assert to_steps(text, "config.total", 256, 7200) == steps
    assert to_steps(text, "config.total", 256, 7200, up=True) == steps_up


@pytest.mark.parametrize("epochs", ["0.29", "0.57", "0.58", "1.13"])
def test_float_rounding_does_not_lose_a_step(epochs):
    """0.29 * 100 is 28.999999999999996 in floating point."""
    expected = round(float(epochs) * 100)
    assert int(float(epochs) * 100) == expected - 1
    for up in (False, True):
        assert to_steps(f"{epochs} epochs", "config.total", 1, 100, up=up) == expected


def test_every_hundredth_of_an_epoch_of_100_steps_is_that_many_steps():
    for n in range(1, 100):
        for text in (f".{n:02d} epochs", f"{n / 100} epochs", f"{n}e-2 epochs"):
            assert [to_steps(text, "config.total", 1, 100, up=up) for up in (False, True)] == [n, n], text


def test_repeating_decimal_is_a_whole_number_of_steps():
    for up in (False, True):
        assert to_steps(f"{1 / 3} epochs", "config.total", 1, 9, up=up) == 3  # not 2 or 4 for its last digit


def test_intervals_that_divide_a_run_end_with_the_run():
    """45 epochs of 28.125 steps: three intervals, and none that ends two steps before the run."""
    total, every = to_steps("45 epochs", "total", 256, 7200), to_steps("15 epochs", "every", 256, 7200, up=True)
    assert (total, every) == (1265, 422)
    assert 2 * every < total < 3 * every


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config.total is not set"),
        ("", "config.total is not set"),
        (200, "config.total=200 has no unit; say '200 steps', '200 epochs' or '200 examples'"),
        (2.0, "has no unit"),
        (True, "has no unit"),
        ("200", "config.total='200' has no unit; say '200 steps', "),
        ("10k", "has no unit"),
        ("steps", "is not a duration; say '200 steps', '45 epochs' or '3M examples'"),
        ("45 epoches", "is not a duration"),
        ("ten epochs", "is not a duration"),
        ("1,000 steps", "is not a duration"),
        ("1m steps", "is not a duration"),
        ("_1 steps", "is not a duration"),
        (". epochs", "is not a duration"),
        ("1 2 steps", "is not a duration"),
        ("k steps", "is not a duration"),
        ("inf epochs", "is not a duration"),
        ("1e999999999 epochs", "is not a duration"),
        ("-1 epochs", "is negative"),
        ("2.5 steps", "is a fraction of a step; give a whole number of steps"),
        ("1e-1 examples", "is a fraction of an example"),
        (("45 epochs",), "is not a duration"),
    ],
)
def test_malformed_duration_is_a_one_line_error(text, message):
    with pytest.raises(UserError) as caught:
        parse(text, "config.total")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
