"""Recipes of augmentations: their check before compilation, and the function from a batch to its views.

A recipe is a sequence of (operation name, keyword arguments) pairs. A method gets one recipe per view:

    (("random_resized_crop", {"size": 32}), ("flip", {}), ("color_jitter", {"hue": 0.1}), ("grayscale", {}))

Views of several sizes form groups of one size each, {'global': (recipe, recipe), 'local': (recipe,) * 6}.
"""

import difflib
import inspect
import math
import numbers
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

from ssl_jax.augment import blur, color, erasing, geometry, randaugment
from ssl_jax.errors import UserError

OPERATIONS = {
    function.__name__: function
    for function in (
        geometry.random_resized_crop,
        geometry.random_crop,
        geometry.flip,
        color.color_jitter,
        color.grayscale,
        blur.blur,
        color.solarize,
        color.drop_colors,
        color.project_colors,
        randaugment.rand_augment,
        erasing.erase,
    )
}

MOVING = ("random_resized_crop", "random_crop", "flip")  # pixels change their places, so labels of pixels would not fit

# How an operation changes the size: (height, width), arguments -> (height, width). Other operations keep the size.
SIZES = {
    "random_resized_crop": lambda hw, size, **_: geometry.size_pair(size),
    "random_crop": lambda hw, size, **_: geometry.size_pair(size),
}


def _is_number(value, low, high):
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= value <= high and value < _INF


def _is_whole(value, low):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= low


def _is_numbers(value, count, low, high):
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) == count
        and all(_is_number(v, low, high) for v in value)
    )


def _is_range(value, low, high):
    return _is_numbers(value, 2, low, high) and 0 < value[0] <= value[1]


def _is_size(value):
    pair = isinstance(value, Sequence) and len(value) == 2 and all(_is_whole(v, 1) and v <= MOST_PIXELS for v in value)
    return pair or (_is_whole(value, 1) and value <= MOST_PIXELS)


_INF = math.inf
MOST_PIXELS = 2**14  # of a side
# Valid values of each argument; a name means the same in every operation.
_ARGUMENTS = {
    "size": (_is_size, f"a positive number of pixels, at most {MOST_PIXELS}, or a pair (height, width)"),
    "pad": (lambda v: _is_whole(v, 0) and v <= MOST_PIXELS, f"a number of pixels from 0 to {MOST_PIXELS}"),
    "area": (lambda v: _is_range(v, 0, 1), "a pair (least, most) with 0 < least <= most <= 1"),
    "ratio": (lambda v: _is_range(v, 0, _INF), "a pair (least, most) with 0 < least <= most"),
    "sigma": (lambda v: _is_range(v, 0, 1000), "a pair (least, most) of pixels with 0 < least <= most <= 1000"),
    "interpolation": (lambda v: v in geometry.INTERPOLATIONS, f"one of {', '.join(geometry.INTERPOLATIONS)}"),
    "sampling": (lambda v: v in geometry.SAMPLINGS, f"one of {', '.join(geometry.SAMPLINGS)}"),
    "style": (lambda v: v in color.STYLES, f"one of {', '.join(color.STYLES)}"),
    "padding": (lambda v: v in blur.PADDINGS, f"one of {', '.join(blur.PADDINGS)}"),
    "antialias": (lambda v: isinstance(v, bool), "True or False"),
    "p": (lambda v: _is_number(v, 0, 1), "a probability from 0 to 1"),
    "threshold": (lambda v: _is_number(v, 0, 1), "a number from 0 to 1"),
    "brightness": (lambda v: _is_number(v, 0, _INF), "a strength of 0 or more"),
    "contrast": (lambda v: _is_number(v, 0, _INF), "a strength of 0 or more"),
    "saturation": (lambda v: _is_number(v, 0, _INF), "a strength of 0 or more"),
    "layers": (lambda v: _is_whole(v, 1) and v <= 16, "a number of operations from 1 to 16"),
    "magnitude": (lambda v: _is_number(v, 0, 10), "a strength from 0 to 10"),
    "deviation": (lambda v: _is_number(v, 0, 10), "a standard deviation from 0 to 10"),
    "hue": (lambda v: _is_number(v, 0, 0.5), "a part of a turn, from 0 to 0.5"),
}


def _unknown(what, name, valid):
    close = difflib.get_close_matches(str(name), valid, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {what} {name!r}; {hint}valid: {', '.join(valid)}"


def _check_operation(where, name, arguments):
    if not isinstance(name, str) or name not in OPERATIONS:
        raise UserError(f"{where}: {_unknown('operation', name, list(OPERATIONS))}")
    where = f"{where} {name}"
    parameters = list(inspect.signature(OPERATIONS[name]).parameters.values())[2:]  # after image and key
    valid = [parameter.name for parameter in parameters]
    for argument, value in arguments.items():
        if argument not in valid:
            raise UserError(f"{where}: {_unknown('argument', argument, valid)}")
        accepts, meaning = _ARGUMENTS[argument]
        if not accepts(value):
            raise UserError(f"{where}: {argument}={value!r} is not allowed; give {meaning}")
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in arguments:
            raise UserError(f"{where}: argument {parameter.name!r} is missing; give {_ARGUMENTS[parameter.name][1]}")
    if arguments.get("sampling") == "simclr" and arguments.get("area", (0, 1))[1] <= geometry.SIMCLR_MIN_COVERED:
        raise UserError(
            f"{where}: area={arguments['area']!r} with sampling='simclr', which rejects crops below "
            f"{geometry.SIMCLR_MIN_COVERED} of the image; use sampling='torchvision' for small crops"
        )


def _as_tuples(value):
    return tuple(_as_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def check_recipes(recipes):
    """Checks names, arguments and values of a sequence of recipes, one per view.

    Returns [[(name, arguments), ...], ...] with tuples in place of lists, so that equal recipes compare equal.
    Raises UserError with view, position, operation, argument and valid values.
    """
    if isinstance(recipes, str) or not isinstance(recipes, Iterable) or not list(recipes):
        raise UserError(f"views={recipes!r}: give a list of recipes, one per view, each a list of (operation, arguments)")
    checked = []
    for view, recipe in enumerate(recipes):
        if isinstance(recipe, str) or not isinstance(recipe, Iterable):
            raise UserError(f"views[{view}]={recipe!r} is not a recipe; give a list of (operation, arguments) pairs")
        operations = []
        for position, pair in enumerate(recipe):
            where = f"views[{view}][{position}]"
            is_pair = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
            if not is_pair or not hasattr(pair[1], "items"):
                raise UserError(f"{where}={pair!r} is not a pair (operation, arguments), as in ('flip', {{'p': 0.5}})")
            name, arguments = pair[0], {key: _as_tuples(value) for key, value in pair[1].items()}
            _check_operation(where, name, arguments)
            operations.append((name, arguments))
        checked.append(operations)
    return checked


def output_size(recipes, input_hw):
    """(height, width) in pixels of the views of images of input_hw = (H, W); for groups, {name: (height, width)}.

    Raises UserError if a window is larger than the padded image, or if views of a group differ in size.
    """
    if _is_groups(recipes):
        return {name: output_size(_checked_group(name, group), input_hw) for name, group in _sorted(recipes)}
    if min(input_hw) < 1:
        raise UserError(f"views: images of {input_hw[0]} x {input_hw[1]} pixels have nothing to show; give larger images")
    sizes = []
    for view, recipe in enumerate(check_recipes(recipes)):
        size = tuple(input_hw)
        for position, (name, arguments) in enumerate(recipe):
            height, width = size
            if name == "random_crop":
                pad, wanted = arguments.get("pad", 0), geometry.size_pair(arguments["size"])
                if wanted[0] > height + 2 * pad or wanted[1] > width + 2 * pad:
                    raise UserError(
                        f"views[{view}][{position}] random_crop: size={arguments['size']!r} does not fit an image of "
                        f"{height} x {width} pixels with pad={pad}; use a smaller size, more pad or larger images"
                    )
            size = SIZES[name](size, **arguments) if name in SIZES else size
        sizes.append(size)
    if len(set(sizes)) > 1:
        raise UserError(
            f"views: outputs differ in size (height, width): {sizes}; use one size, or make groups of one size each"
        )
    return sizes[0]


def _is_groups(recipes):
    return hasattr(recipes, "items")  # a dict or a ConfigDict


def _sorted(groups):
    """Groups sorted by name, an order that survives writing and reading a config."""
    if not list(groups):
        raise UserError("views={}: give at least one group of recipes, {'global': (recipe, recipe), ...}")
    if not all(isinstance(name, str) for name in groups):
        raise UserError(f"views: groups {sorted(map(str, groups))} must have names; write {{'global': (recipe, recipe), ...}}")
    return sorted(groups.items())


def _apply_recipe(recipe, image, key):
    for position, (name, arguments) in enumerate(recipe):
        image = OPERATIONS[name](image, jax.random.fold_in(key, position), **arguments)
    return image


def make_views(recipes):
    """The function (images, key) -> views, float32 [B, V, h, w, 3], for V recipes.

    images: uint8 [B, H, W, 3], from which all views are made, or uint8 [B, V, H, W, 3], one crop per view. The index in B
    is the index in the global batch. Randomness is fold_in(key, example), then fold_in(., view), then fold_in(., position
    in the recipe). It depends neither on the number of devices nor on the number of views. Equal recipes are traced once.

    For groups {name: V recipes of one size} the function returns {name: [B, V, h, w, 3]}. Views are then numbered through
    all groups, sorted by name, and images are [B, H, W, 3].

    Raises UserError for an invalid recipe; the returned function raises ValueError for invalid images.
    """
    if _is_groups(recipes):
        built, first = {}, 0
        for name, group in _sorted(recipes):
            built[name] = _views_from(_checked_group(name, group), first)
            first += len(list(group))

        def groups(images, key):
            if images.ndim != 4:
                raise ValueError(f"views in groups need images [B, H, W, 3], not {images.shape}")
            return {name: views(images, key) for name, views in built.items()}

        return groups
    return _views_from(check_recipes(recipes), 0)


def in_place_view(recipes):
    """`make_views` of one recipe that leaves every pixel in its place, for images whose pixels or boxes have labels.

    Raises UserError for several recipes, or an operation of MOVING; the host crops and mirrors images and labels together.
    """
    checked = check_recipes(() if _is_groups(recipes) else recipes)
    if len(checked) != 1:
        raise UserError(f"config.views has {len(checked)} recipes, and images with labels in place need one view: give one recipe")
    for name, _ in checked[0]:
        if name in MOVING:
            raise UserError(
                f"config.views: {name} moves pixels but not their labels; use config.data.ops, which crop and mirror both (flip=0.5)"
            )
    return make_views(checked)


def make_patch_views(recipe):
    """The function (patches, key) -> patches, which applies one recipe to each patch of float32 [B, N, H, W, 3] in [0, 1].

    Each patch has its own random numbers, from fold_in(fold_in(key, example), patch). For what all patches of an image share, use
    `config.views` before cutting them. Raises UserError for an invalid recipe.
    """
    (operations,) = check_recipes([recipe])

    def views(patches, key):
        def of_example(example, patches):
            example_key = jax.random.fold_in(key, example)
            keys = jax.vmap(lambda patch: jax.random.fold_in(example_key, patch))(jnp.arange(len(patches)))
            return jax.vmap(lambda patch, patch_key: _apply_recipe(operations, patch, patch_key))(patches, keys)

        return jax.vmap(of_example)(jnp.arange(len(patches)), patches)

    return views


def _checked_group(name, group):
    try:
        return check_recipes(group)
    except UserError as error:
        raise UserError(f"group {name!r}: {error}") from error


def _views_from(recipes, first):
    """`make_views` of checked recipes; the first is view number `first`."""
    count = len(recipes)

    def views(images, key):
        if images.dtype != jnp.uint8 or images.ndim not in (4, 5) or images.shape[-1] != 3:
            raise ValueError(f"images must be uint8 [B, H, W, 3] or [B, V, H, W, 3], not {images.dtype}{images.shape}")
        if 0 in images.shape[-3:-1]:
            raise ValueError(f"images of {images.shape[-3]} x {images.shape[-2]} pixels have nothing to show")
        if images.ndim == 5 and images.shape[1] != count:
            raise ValueError(f"{images.shape[1]} crops per image for {count} views")

        def views_of_example(index, image):
            image = image.astype(jnp.float32) / 255.0
            example_key = jax.random.fold_in(key, index)
            keys = jax.vmap(lambda view: jax.random.fold_in(example_key, view))(jnp.arange(first, first + count))
            if all(recipe == recipes[0] for recipe in recipes):
                axis = 0 if images.ndim == 5 else None
                return jax.vmap(lambda pixels, view_key: _apply_recipe(recipes[0], pixels, view_key), (axis, 0))(
                    image, keys
                )
            crops = image if images.ndim == 5 else [image] * count
            return jnp.stack([_apply_recipe(recipes[v], crops[v], keys[v]) for v in range(count)])

        return jax.vmap(views_of_example)(jnp.arange(images.shape[0]), images)

    return views
