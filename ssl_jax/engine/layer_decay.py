"""Learning rates that fall with the distance from the output: `lr_multipliers` for fine-tuning (Clark et al. 2020, ELECTRA; BEiT; MAE).

The head has the multiplier 1, the layer below it `decay`, the next one `decay` squared. Names are those of an encoder in the group
'net': 'net/encoder/...' or, of a stage, 'net/backbone/...'.
"""

from __future__ import annotations

from ssl_jax.errors import UserError

ENCODER = r"^net/(encoder|backbone)/"
Rules = tuple[tuple[str, float], ...]


def vit_layer_decay(depth: int, decay: float) -> Rules:
    """Rules for a ViT of `depth` blocks (scan=False), as MAE's code: decay^(depth + 1 - id).

    Patches, class token, registers and positions have id 0, block i has i + 1; the last normalization and all that is no part of the
    encoder have the multiplier 1.
    """
    blocks = tuple((rf"{ENCODER}block{i}/", decay ** (depth - i)) for i in range(depth))
    first = (rf"{ENCODER}(patch_embed|cls_token|registers|pos_embed)", decay ** (depth + 1))
    return _checked(decay, (first, *blocks))


def resnet_layer_decay(decay: float) -> Rules:
    """Rules for a ResNet by stages: decay^(5 - id), where the stem has id 0 and layer1 to layer4 have theirs."""
    groups = tuple((rf"{ENCODER}layer{i}_", decay ** (5 - i)) for i in range(1, 5))
    return _checked(decay, ((rf"{ENCODER}stem_", decay**5), *groups))


def _checked(decay: float, rules: Rules) -> Rules:
    if not 0 < decay <= 1:
        raise UserError(f"layer decay {decay} must be above 0 and at most 1; 1 trains all layers alike")
    return (*rules, (".*", 1.0))
