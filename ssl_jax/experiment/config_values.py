"""Which values a config may hold: one table from keys to kinds of values, checked when a config is read.

A key that the table does not name may hold any text, finite numbers, and no negative number where its recipe has none. Whether a
name is that of an optimizer, a layer or an operation is checked where it is used.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ssl_jax.errors import UserError, printable

LARGEST = 2**31 - 1  # counts and steps are 32-bit integers on devices
SIZE = 2**20  # of a layer, a batch or a codebook


class Kind(NamedTuple):
    """A kind of value."""

    accepts: Callable[[Any], bool]
    words: str  # what to give, for messages


def whole(least: int, most: int = LARGEST) -> Kind:
    """Whole numbers from `least` to `most`."""
    return Kind(
        lambda v: isinstance(v, numbers.Integral) and not isinstance(v, bool) and least <= v <= most,
        f"a whole number from {least} to {most}",
    )


def number(least: float = -math.inf, most: float = math.inf, above: float | None = None, below: float | None = None) -> Kind:
    """Finite numbers in [least, most], or (above, below)."""

    def accepts(v):
        real = isinstance(v, numbers.Real) and not isinstance(v, bool) and _finite(v)
        return real and least <= v <= most and (above is None or v > above) and (below is None or v < below)

    low = f"above {above:g}" if above is not None else f"of {least:g} or more" if least > -math.inf else ""
    high = f"below {below:g}" if below is not None else f"at most {most:g}" if most < math.inf else ""
    return Kind(accepts, " ".join(filter(None, ["a finite number", " and ".join(filter(None, [low, high]))])))


def entries(kind: Kind, count: int | None = None, least: int = 0) -> Kind:
    """Sequences of `kind`: of `count` entries, or of `least` or more."""

    def accepts(v):
        return _is_sequence(v) and (len(v) == count or (count is None and len(v) >= least)) and all(map(kind.accepts, v))

    many = f"{count}" if count is not None else f"{least} or more" if least else "any number of"
    return Kind(accepts, f"a sequence of {many} entries, each {kind.words}")


def pairs(second: Kind, what: str) -> Kind:
    """Sequences of (regular expression, `second`)."""

    def accepts(v):
        return _is_sequence(v) and all(_is_sequence(p) and len(p) == 2 and _is_regex(p[0]) and second.accepts(p[1]) for p in v)

    return Kind(accepts, f"a sequence of pairs (regular expression, {what})")


def optional(kind: Kind) -> Kind:
    """None, or `kind`."""
    return Kind(lambda v: v is None or kind.accepts(v), f"None or {kind.words}")


def either(*kinds: Kind) -> Kind:
    """A value of one of `kinds`."""
    return Kind(lambda v: any(kind.accepts(v) for kind in kinds), " or ".join(kind.words for kind in kinds))


def table(values: Kind | None = None) -> Kind:
    """Tables {name: value} with names that are words."""

    def accepts(v):
        return _is_table(v) and all(TEXT.accepts(k) and k and (values is None or values.accepts(x)) for k, x in v.items())

    return Kind(accepts, "a table, dict(name=value)" + (f", where each value is {values.words}" if values else ""))


def _finite(value) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond floats
        return False


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_table(value: Any) -> bool:
    return hasattr(value, "items")  # a dict or a ConfigDict, which is no Mapping


def _is_regex(value: Any) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except (re.error, OverflowError, RecursionError):
        return False


TEXT = Kind(lambda v: isinstance(v, str) and printable(v) == v, "a word without control characters")
NAME = Kind(lambda v: TEXT.accepts(v) and v.strip() != "", "a word, not empty and without control characters")
TRUTH = Kind(lambda v: isinstance(v, bool), "True or False")
COUNT, LAYERS, AT_LEAST_0 = whole(1, SIZE), whole(1, 1024), whole(0)  # each layer is traced by itself, so many would hang
SHARE, BELOW_1, POSITIVE, WEIGHT = number(0, 1), number(0, below=1), number(above=0), number(0)
MESH = Kind(lambda v: v == -1 or whole(1).accepts(v), "a positive whole number, or -1 for all remaining devices")
SHARDING = Kind(lambda v: isinstance(v, str) or (_is_sequence(v) and all(isinstance(x, str | None) for x in v)), "a rule")
ANY = Kind(lambda v: True, "any value")  # durations, which `resolve` parses
SPEC = Kind(
    lambda v: _is_sequence(v) and len(v) == 2 and entries(AT_LEAST_0).accepts(v[0]) and TEXT.accepts(v[1]),
    "a pair (shape, dtype), such as ((4,), 'float32')",
)
CHANNELS = Kind(lambda v: not isinstance(v, bool) and v in (1, 3), "1 or 3")
PICTURE = Kind(
    lambda v: _is_sequence(v) and len(v) == 3 and all(map(whole(1, 2**14).accepts, v[:2])) and CHANNELS.accepts(v[2]),
    "(height, width, channels) in pixels, at most 16384, with 1 or 3 channels",
)
OPS = Kind(
    lambda v: _is_sequence(v) and all(_is_sequence(p) and len(p) == 2 and isinstance(p[0], str) and _is_table(p[1]) for p in v),
    "a sequence of pairs (name, arguments), such as [('resize_crop', dict(resize=256, crop=224))]",
)
AXES = Kind(
    lambda v: _is_sequence(v) and len(v) > 0 and all(
        _is_sequence(a) and len(a) == 3 and NAME.accepts(a[0]) and POSITIVE.accepts(a[1]) and whole(2, SIZE).accepts(a[2]) for a in v
    ),
    "a sequence of (name, limit above 0, number of bins from 2 on), such as [('dx', 4.0, 9)]",
)  # fmt: skip

_MISSING = object()
# Keys that every config of a file must have. Of other keys the first pattern that matches the whole dotted key says what it may hold.
KEYS = {
    "method": NAME, "seed": AT_LEAST_0, "batch_size": COUNT, "accumulate": whole(1, SIZE), "dtype": NAME, "xla": TEXT,
    "convolutions": NAME,
    "on_nonfinite": NAME, "total": ANY, "evaluate_every": ANY,
    "checkpoint_every": ANY, "log_every_steps": whole(1), "keep_checkpoints": whole(1), "best_metric": TEXT,
    "data": table(), "mesh": table(), "stages": table(table()), "warm_start": table(),
    "online_probe": WEIGHT,
    "evals": table(table()), "eval_batch_size": COUNT, "references": table(table(number())), "baselines": entries(NAME),
    "optim": table(table()), "sharding": pairs(SHARDING, "'fsdp', 'replicate' or mesh axes"),
    "data.name": NAME, "data.data_dir": TEXT, "data.train_split": NAME, "data.test_split": NAME, "data.ops": OPS, "data.eval_ops": OPS,
    "data.features": table(NAME), "data.kinds": table(NAME), "data.vocabulary": table(optional(whole(1))), "data.specs": table(SPEC),
    "data.follow_links": TRUTH, "data.bank_split": TEXT,
    "data.workers": whole(0, 1024), "data.image_shape": entries(whole(1, SIZE)), "data.num_classes": optional(whole(1)),
    "data.examples": optional(whole(1, 2**48)), "warm_start.workdir": optional(TEXT),
    "warm_start.rules": pairs(TEXT, "replacement"),
}  # fmt: skip
PATTERNS = {re.compile(pattern): kind for pattern, kind in {
    # devices, stages and optimizers
    r"mesh\.\w+": MESH,
    r"stages\.\w+\.(workdir|weights|recipe)": TEXT,
    r"stages\.\w+\.step": optional(AT_LEAST_0),
    r"stages\.\w+\.untrained": TRUTH,
    r"optim\.\w+\.lr": optional(number()),  # that it is positive, `engine.optim` says, with what to do instead
    r"optim\.\w+\.(b1|b2|momentum)": BELOW_1,
    r"optim\.\w+\.hold": SHARE,
    r"optim\.\w+\.milestones": entries(SHARE),
    r"optim\.\w+\.(trust|power|threshold)": POSITIVE,
    r"optim\.\w+\.factored_from": COUNT,
    r"optim\.\w+\.(clip_norm|clip_tensor_norm|weight_decay_end)": optional(WEIGHT),
    r"optim\.\w+\.nesterov": TRUTH,
    r"optim\.\w+\.(weight_decay_mask|lr_multipliers)": pairs(WEIGHT, "a number of 0 or more"),
    # models: the input
    r"model": table(),
    r"model\.mean": entries(number(), 3),
    r"model\.std": entries(POSITIVE, 3),
    r"model\.standardize": TRUTH,
    # transfers
    r"data\.classes\.\w+": optional(COUNT),
    r"model\.classes": optional(whole(2, 255)),  # masks have 8 bits, and one value is ignored
    r"model\.ignore": whole(0, 255),
    r"model\.head\.name": NAME,
    r"model\.weights\.(heat|size|offset|class|box)": WEIGHT,
    r"model\.(objects|detections)": whole(1, 2**14),
    r"model\.head\.candidates": whole(1, 2**13),
    r"model\.head\.stride": COUNT,
    r"model\.head\.towers": whole(0, 64),
    r"model\.head\.reach": entries(POSITIVE, 2),
    r"model\.head\.overlap": SHARE,
    r"model\.question\.length": whole(1, 4096),
    r"model\.fusion\.hops": LAYERS,
    r"model\.fusion\.(projection|attended)": COUNT,
    r"model\.fusion\.hidden": COUNT,
    r"model\.(backbone|image|pool)": NAME,
    r"model\.drop_path": BELOW_1,
    r"model\.head_std": WEIGHT,
    r"model\.mix\.(mixup|cutmix)": WEIGHT,
    r"model\.mix\.(p|switch)": SHARE,
    # joint embedding
    r"model\.momentum": SHARE,
    r"model\.momentum_schedule": NAME,
    r"model\.(stop_gradient|symmetric)": TRUTH,
    r"model\.mask_ratio": number(0, 1),
    r"model\.(norm_pix|shared_head)": TRUTH,
    r"model\.centering": NAME,
    r"model\.masked_share": SHARE,
    r"model\.masked_ratio": entries(SHARE, 2),
    r"model\.koleo_group": COUNT,
    r"model\.(targets|kept)": COUNT,
    r"model\.(target_size|context_size)": entries(COUNT, 2),
    r"model\.queue": AT_LEAST_0,
    r"model\.(.*\.)?(prototypes|iterations|bottleneck)": COUNT,
    r"model\.(teacher_temperature|teacher_temperature_end)": POSITIVE,
    r"model\.center_momentum": SHARE,
    r"model\.epsilon": POSITIVE,
    r"model\.weights\.variance": WEIGHT,
    r"model\.groups": COUNT,
    # pretext tasks
    r"model\.turns": entries(whole(0, 3), least=2),
    r"model\.(grid|tile|puzzles)": COUNT,
    r"model\.(jitter|permutations\.count)": AT_LEAST_0,
    r"model\.(layer|permutations\.kind)": NAME,
    r"model\.pairs\.(start|limits)": entries(WEIGHT, 4),
    r"model\.pairs\.(size|length)": whole(1, 2**14),
    r"model\.pairs\.whole_pixels": TRUTH,
    r"model\.axes": AXES,
    r"model\.pairs\.motions": entries(entries(number(), 4), least=2),
    r"model\.margin": POSITIVE,
    r"model\.(tile|patch)_operations": OPS,
    r"model\.offsets": entries(COUNT, least=1),
    r"model\.directions": entries(NAME, least=1),
    r"model\.target_dim": whole(0, SIZE),
    r"model\.embedding_scale": POSITIVE,
    # widths and counts; some are texts ('tiny') or factors (0.25) in some models
    r"model\.(.*\.)?encoder\.width": either(whole(1, SIZE), number(above=0, most=1024)),
    r"model\.(.*\.)?remat": either(TRUTH, TEXT),
    r"model\.(.*\.)?size": either(COUNT, NAME),
    r"model\.windows": entries(entries(AT_LEAST_0, 2)),
    r"model\.(.*\.)?(start|tuning_start|warmup|head_layers|truncation_layers|top_k|probe_block)": AT_LEAST_0,
    r"model\.channels": CHANNELS,
    r"model\.generator\.shape": PICTURE,
    r"model\.(generator|discriminator)\.(widths|multiples)": entries(COUNT, least=1),
    r"model\.(.*\.)?(widths|multiples|attention|valid|levels|head|hidden)": either(entries(COUNT), COUNT, table()),
    r"model\.(.*\.)?(width|block_width|channels|channel_base|channel_max|features|embedding|heads|patch|kernel)": COUNT,
    r"model\.(.*\.)?(final_kernel|dim|group|latent_size|code_size|samples)": COUNT,
    r"model\.(.*\.)?(depth|layers|mapping_layers|stages|blocks|fakes|discriminator_steps|bits)": LAYERS,
    r"model\.(.*\.)?(interval|steps|half_life_examples|rotated)": whole(1),
    # shares, and factors of averages
    r"model\.(.*\.)?(dropout|label_dropout|smoothing|mixing|target|top_p)": SHARE,
    r"model\.(.*\.)?decay": BELOW_1,
    r"model\.(.*\.)?(temperature|variance)": POSITIVE,
    # pretext tasks
    r"model\.(stride|target\.(neighbors|window|bins))": COUNT,
    r"model\.target\.sigma": POSITIVE,
    r"model\.target\.(rebalance|hue_weight)": WEIGHT,
    r"model\.maps": entries(NAME, least=1),
    # weights of terms
    r"model\.(.*\.)?(weight|weights\..*|beta|contraction|absolute|squared|entropy|commitment|orthogonal|guidance|free_bits)": WEIGHT,
    r"model\.(.*\.)?(logit_laplace|sparsity|revive|ramp|level|condition_std|kernel_std|choice_temperature)": WEIGHT,
    r"model\.corruption\.emphasis": entries(WEIGHT, 2),
    r"model\.augment\.policy": entries(NAME),
}.items()}  # fmt: skip


def check_keys(config: Mapping[str, Any]) -> None:
    """Raises UserError if a key that every run needs is missing."""
    for key in KEYS:
        node: Any = config
        for part in key.split("."):
            if _is_table(node) and part not in node:
                raise UserError(f"config.{key} is missing, and every run needs it; configs.common.base sets all but config.optim")
            node = node[part] if _is_table(node) else {}  # what is no table, `check_values` refuses


def check_values(config: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> None:
    """Check every value of a config but those of its stages' configs.

    Args:
        before: {dotted key: value} of the recipe without overrides.

    Raises:
        UserError: a value has a wrong type or is out of range.
    """
    for key, kind in KEYS.items():
        value: Any = config
        for part in key.split("."):
            value = value.get(part, _MISSING) if _is_table(value) else _MISSING
        if value is not _MISSING:
            _check(key, value, kind)
    for key, value in flatten(config).items():
        if key in KEYS or re.match(r"stages\.\w+\.config\.", key):
            continue
        kind = next((kind for pattern, kind in PATTERNS.items() if pattern.fullmatch(key)), None)
        if kind is not None:
            _check(key, value, kind)
        else:
            _check_unnamed(key, value, (before or {}).get(key, value))


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of all values that are not tables, and of empty tables."""
    found = {}
    for key, value in config.items():
        if hasattr(value, "items") and len(value):
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _check(key: str, value: Any, kind: Kind) -> None:
    if not kind.accepts(value):
        raise UserError(f"config.{key}={_short(value)} must be {kind.words}{_broken_regex(value)}")


def _check_unnamed(key: str, value: Any, default: Any) -> None:
    """Any number in `value` is finite, and negative only where one in the recipe is; texts have no control characters."""
    negative = any(isinstance(x, numbers.Real) and x < 0 for x in _scalars(default))
    for x in _scalars(value):
        if isinstance(x, numbers.Real) and not isinstance(x, bool) and not (_finite(x) and abs(x) < 1e38):
            raise UserError(f"config.{key}={_short(value)} must be finite")
        if isinstance(x, numbers.Real) and x < 0 and not negative and not key.startswith("evals."):
            raise UserError(f"config.{key}={_short(value)} must not be negative")
        if isinstance(x, numbers.Integral) and abs(x) > LARGEST:
            raise UserError(f"config.{key}={_short(value)} must be at most {LARGEST}")
        if isinstance(x, str) and printable(x) != x:
            raise UserError(f"config.{key}={_short(value)} has control characters; leave them out")


def _scalars(value: Any):
    if _is_table(value):
        value = list(value.values())
    if not _is_sequence(value):
        yield value
        return
    for each in value:
        yield from _scalars(each)


def _broken_regex(value: Any) -> str:
    """The end of a message: which regular expression of a list of pairs does not compile, and why; '' if all do."""
    for pair in value if _is_sequence(value) else ():
        if _is_sequence(pair) and len(pair) == 2 and isinstance(pair[0], str):
            try:
                re.compile(pair[0])
            except (re.error, OverflowError, RecursionError) as error:
                return f"; {pair[0]!r} is not a regular expression ({error})"
    return ""


def _plain(value: Any) -> Any:
    return {key: _plain(each) for key, each in value.items()} if _is_table(value) else value


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, str) and printable(value) == value else repr(_plain(value))
    return text if len(text) <= 120 else f"{text[:100]}...{text[-10:]}"
