"""Loading a config file: what the command line got wrong is one line, what the file's own code raises keeps its traceback."""

import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from launch import main
from ssl_jax.augment.views import make_views, output_size
from ssl_jax.engine.sharding import make_mesh
from ssl_jax.errors import PrintableFormatter, UserError, printable
from ssl_jax.experiment import config as configs
from ssl_jax.experiment import sizes
from ssl_jax.experiment.config_values import KEYS, check_values
from ssl_jax.experiment.overrides import literal
from ssl_jax.objectives.codebooks import build_quantizer
from ssl_jax.objectives.contrastive import loss_of_views, nt_xent


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


def set_by(name, *overrides):
    return configs.load(f"configs/{name}.py:smoke", [f"--config.{override}" for override in overrides])


RESIZE = (("resize_crop", {"resize": 256, "crop": 224}),)


@pytest.mark.parametrize(
    "text",
    [
        "[('resize_crop', dict(resize=256, crop=224))]",
        "('resize_crop', {'resize':256, 'crop':224})",
        "('resize_crop', dict(resize=256, crop=224)),",
        "(('resize_crop',{'resize':256,'crop':224}),)",
        "[['resize_crop', {'resize': 256, 'crop': 224}]]",
        "(\n  ('resize_crop',\n\tdict(resize=256, crop=224)),\n)",
    ],
)
def test_ops_are_parsed_as_people_type_them(text):
    assert set_by("gan", f"data.ops={text}").data.ops == RESIZE


def test_a_single_rule_needs_no_outer_tuple():
    assert set_by("gan", "sharding=('.*', 'replicate')").sharding == ((".*", "replicate"),)
    assert set_by("simclr", "warm_start.rules=['^net/', 'net/']").warm_start.rules == (("^net/", "net/"),)


def test_entries_of_sequences_are_set_by_index():
    views = ("views[-1]=[('flip', dict(p=0.25))]", "views[0][1][1].p=1")
    config = set_by("simclr", "model.mean[0]=0.25", "model.head.widths[1]=64", *views)
    assert (config.model.mean[0], config.views[1]) == (0.25, (("flip", {"p": 0.25}),))
    assert config.views[0][1] == ("flip", {"p": 1.0})
    assert config.model.head.widths[1] == 64


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("batch_size=1e2", 100), ("batch_size=1_000", 1000), ("optim.net.lr=1", 1.0), ("model.encoder.zero_init_residual=TRUE", True),
        ("data.name='a b'", "a b"), ("data.name=a b", "a b"), ("model.head.widths=64", (64,)), ("model.head.widths=64,32", (64, 32)),
        ("evals={}", {}), ("evals=dict(knn=dict(kind='knn', k=3))", {"knn": {"kind": "knn", "k": 3}}), ("evals.a.kind=knn", None),
        ("views={'a': ((('flip', {}),),)}", {"a": ((("flip", {}),),)}), ("stages.x.workdir=1", UserError), ("data.num_classes=5", 5),
        ("data.examples=None", None), ("references={'paper': {'knn/top1': 3}}", {"paper": {"knn/top1": 3}}),
    ],
)  # fmt: skip
def test_values_are_cast_to_the_type_of_the_default(override, value):
    if value is UserError:
        with pytest.raises(UserError):
            set_by("simclr", override)
        return
    found = set_by("simclr", override)
    for key in override.partition("=")[0].split("."):
        found = found[key]
    found = found.to_dict() if hasattr(found, "to_dict") else found
    if override != "evals.a.kind=knn":
        assert found == value
        assert type(found) is type(value)
    else:
        assert found == "knn"


def test_a_reference_between_keys_survives_an_override(tmp_path):
    path = write(tmp_path, "from configs import simclr\ndef get_config(variant=''):\n    config = simclr.get_config('smoke')\n"
                           "    config.eval_batch_size = config.get_ref('batch_size')\n    return config")  # fmt: skip
    assert configs.load(str(path), ["--config.batch_size=64"]).eval_batch_size == 64


def test_literals_call_nothing_and_warn_of_nothing(recwarn):
    assert literal("dict(a=1, b=dict(c=(2,)))") == {"a": 1, "b": {"c": (2,)}}
    for text in ("__import__('os').getcwd()", "dict(**{'a': 1})", "open('x')", "1or 2", "(" * 300, "a.b", "9" * 5000, "{[]: 1}"):
        assert literal(text) == text
    assert not recwarn


def test_every_key_of_base_is_checked():
    """A new key of `common.base` needs a kind, or values of a wrong type would pass."""
    config = common.base("simclr")
    config.optim, config.total = {}, "1 step"
    keys = [*config, *(f"data.{key}" for key in config.data), *(f"warm_start.{key}" for key in config.warm_start)]
    assert set(keys) == set(KEYS)
    check_values(config)


@pytest.mark.parametrize("value", [float("nan"), -1.0, 1e39])
def test_keys_of_a_method_that_the_table_does_not_name_are_finite_and_keep_their_sign(value):
    config = common.base("mine")
    config.optim, config.model = {}, {"made_up": value}
    with pytest.raises(UserError, match=r"config.model.made_up=\S+ must"):
        check_values(config, {"model.made_up": 2.0})
    if value == -1.0:
        check_values(config, {"model.made_up": -3.0})


def test_names_cannot_steer_a_terminal_or_end_a_line(capsys, tmp_path):
    assert printable("a\x1b[2J\nb\x9bc\u2028\ud800é") == "a\\x1b[2J\\nb\\x9bc\\u2028\\ud800é"
    record = logging.LogRecord("ssl_jax", logging.INFO, "", 0, "a\x1b[2J\r\nb", (), None)
    assert PrintableFormatter("%(message)s").format(record) == "a\\x1b[2J\\r\\nb"
    assert main(["status", f"--workdir={tmp_path}\nrm -rf"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_array_or_a_state_that_no_memory_holds_is_refused():
    mesh = make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shape = lambda *size: jax.ShapeDtypeStruct(size, jnp.float32, sharding=everywhere)  # noqa: E731
    state = types.SimpleNamespace(kernel=shape(2**20, 2**18)).__dict__
    sizes.check_arrays(state, {"image": shape(8)})
    with pytest.raises(UserError, match=r"take 1,024 GiB, and there are \d+ GiB of memory .*kernel"):
        sizes.check_memory(state, {"image": shape(8)}, mesh)
    with pytest.raises(UserError, match=r"of shape \(1048576, 1048577\) would take 4,096 GiB"):
        sizes.check_arrays({"kernel": shape(2**20, 2**20 + 1)}, {})


@pytest.mark.parametrize("spec", [dict(name="learned", size=8, dim=2), dict(name="fsq", levels=(3, 5)), dict(name="lfq", bits=3)])
def test_tokens_outside_the_codebook_are_refused(spec):
    quantizer = build_quantizer(spec)
    params, state = quantizer.init(jax.random.key(0))
    for token in (-1, quantizer.size):
        with pytest.raises(UserError, match=f"this codebook has tokens 0 to {quantizer.size - 1}"):
            quantizer.embed(params, state, jnp.array([0, token]))
    codes = jax.jit(quantizer.embed)(params, state, jnp.array([-1, quantizer.size, 1]))
    assert np.isnan(codes[:2]).all()
    assert (codes[2] == quantizer.codebook(params, state)[1]).all()


@pytest.mark.parametrize("temperature", [0.0, -0.2, float("nan"), float("inf"), "warm"])
def test_a_temperature_of_zero_or_less_is_refused(temperature):
    with pytest.raises(UserError, match=r"config\.model\.temperature"):
        loss_of_views("nt_xent", temperature, "dense")
    if temperature != "warm":
        with pytest.raises(UserError, match=r"must be a positive number"):
            nt_xent(jnp.ones((2, 2, 3)), temperature)


def test_views_of_images_without_pixels_are_refused():
    with pytest.raises(UserError, match="images of 0 x 8 pixels"):
        output_size(((("flip", {}),),), (0, 8))
    with pytest.raises(ValueError, match="images of 0 x 8 pixels"):
        make_views(((("flip", {}),),))(jnp.zeros((2, 0, 8, 3), jnp.uint8), jax.random.key(0))
