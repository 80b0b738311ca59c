"""Loading a config file: what the command line got wrong is one line, what the file's own code raises keeps its traceback."""

import pytest

from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs


def write(folder, text):
    path = folder / "configs" / "mine.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_missing_config_file_variant_or_get_config_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"--config=configs/simclrr.py: no such file; did you mean configs/simclr.py"):
        configs.load("configs/simclrr.py")
    with pytest.raises(UserError, match=r"variant 'smok' does not exist"):
        configs.load("configs/simclr.py:smok")
    with pytest.raises(UserError, match=r"mine.py defines no function get_config"):
        configs.load(str(write(tmp_path, "def config(): pass")))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("import no_such_package_anywhere", ImportError, "no_such_package_anywhere"),
        ("def get_config(variant): return variant.nonsense", AttributeError, "nonsense"),
        ("def get_config(variant): return len(1, 2)", TypeError, "exactly one argument"),
        ("def get_config(variant:", SyntaxError, "never closed"),
    ],
)
def test_error_in_the_code_of_a_config_file_keeps_its_traceback(tmp_path, text, error, message):
    path = write(tmp_path, text)
    with pytest.raises(error, match=message) as raised:
        configs.load(str(path))
    assert "mine.py" in str(raised.traceback[-1].path) or raised.type in (SyntaxError,)
