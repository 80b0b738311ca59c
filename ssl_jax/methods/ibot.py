"""iBOT and DINOv2: DINO, and masked patches of a view predict how the teacher assigns the same patches, which it sees.

Zhou et al. 2022, "Image BERT pre-training with online tokenizer" (arXiv:2111.07832), section 3. Oquab et al. 2023, "DINOv2"
(arXiv:2304.07193), section 4, adds Sinkhorn-Knopp in place of centers, separate heads for images and patches, and a term that spreads
the embeddings (KoLeo). The teacher is a moving average of the student.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.augment.patches import random_order
from ssl_jax.augment.pixels import to_input
from ssl_jax.augment.views import make_views
from ssl_jax.engine.durations import to_steps
from ssl_jax.engine.method import FEATURES, Method, Phase, Spec
from ssl_jax.engine.siamese import follow, momentum_schedule
from ssl_jax.errors import UserError
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.backbones.vit import parse_variant
from ssl_jax.models.build import construct
from ssl_jax.models.common import create, run
from ssl_jax.models.heads import PrototypeHead
from ssl_jax.objectives.prototypes import entropy, koleo, masked_cross_entropy, sinkhorn, swapped


def build(config, stages) -> Method:
    """`config.model`: encoder (a ViT with a class token), projector (fields of PrototypeHead), mean and std, and

    shared_head: one head for class tokens and patches; else two.
    masked_share: of the large views that have masked patches. masked_ratio: least and largest share of masked patches there.
    centering: 'softmax', with running means of the teacher's logits, or 'sinkhorn'. center_momentum: of the means.
    momentum, momentum_schedule, temperature, teacher_temperature, teacher_temperature_end, teacher_warmup, frozen: as in `dino`.
    weights: masked and koleo, of the terms of patches and of KoLeo. koleo_group: images among which nearest neighbors are sought.

    Raises:
        UserError: another encoder, less than two large views, or an unknown way of centering.
    """
    model = config.model
    if model.encoder["name"] != "vit" or model.encoder.get("pool", "cls") != "cls":
        raise UserError("config.model.encoder: iBOT has masked patches and a class token; give name='vit' and pool='cls'")
    if model.centering not in ("softmax", "sinkhorn"):
        raise UserError(f"config.model.centering={model.centering!r} is unknown; choose softmax or sinkhorn")
    sizes = hasattr(config.views, "keys")
    first = len(next(iter(config.views.values()), ())) if sizes else len(config.views)
    if first < 2:
        raise UserError(f"config.method='ibot' compares views, and the first group of config.views has {first}; give two or more")
    views, size = make_views(config.views), config.batch_size
    _, patch = parse_variant(model.encoder.get("variant", "S/16"))
    calm = build_encoder({**model.encoder, "drop_path": 0.0}, config.dtype)
    encoder = build_encoder(model.encoder, config.dtype)
    heads = {name: construct(PrototypeHead, "projector", model.projector, dtype=config.dtype) for name in ("head", "patch_head")}
    warmup, frozen = (to_steps(model[key], f"config.model.{key}", size, config.data.examples) for key in ("teacher_warmup", "frozen"))

    def by_size(views):
        return list(views.values()) if sizes else [views]

    def to_network(views):
        return to_input(views.reshape(-1, *views.shape[2:]), model.mean, model.std)

    def head(net, name, x):
        """Logits [..., K] of codes [..., D]."""
        part = "head" if model.shared_head else name
        return run(heads[name], net[part], {}, x.reshape(-1, x.shape[-1]), train=True)[0][-1].reshape(*x.shape[:-1], -1)

    def patches(h):
        return h["patches"].reshape(len(h["patches"]), -1, h["patches"].shape[-1])

    def init(key, batch, frozen):
        keys = jax.random.split(key, 4)
        x = to_network(by_size(views(batch["image"], keys[0]))[0])
        masked = jnp.zeros((len(x), x.shape[1] // patch * (x.shape[2] // patch)), bool)
        net = {"encoder": create(calm, keys[1], x, masked=masked)[0]}
        h, _ = run(calm, net["encoder"], {}, x, train=False)
        net["head"], _ = create(heads["head"], keys[2], h["pooled"])
        if not model.shared_head:
            net["patch_head"], _ = create(heads["patch_head"], keys[3], h["pooled"])
        zeros = jnp.zeros(model.projector["prototypes"])
        return {"net": net}, {"teacher": {"net": jax.tree.map(jnp.copy, net)}, "center": {"image": zeros, "patch": zeros}}

    def draw_masks(key, count, patches):
        """(masked bool [count, patches], numbers of the patches that may be masked [count, most], which of them are)"""
        keys = jax.random.split(key, 3)
        low, high = model.masked_ratio
        share = jax.random.uniform(keys[0], (count, 1), minval=low, maxval=high)
        share = jnp.where(jax.random.uniform(keys[1], (count, 1)) < model.masked_share, share, 0.0)
        order, most = random_order(keys[2], count, patches), max(1, int(high * patches))
        chosen = jnp.arange(most) < share * patches
        masked = jnp.zeros((count, patches), bool).at[jnp.arange(count)[:, None], order[:, :most]].set(chosen)
        return masked, order[:, :most], chosen

    def assign(logits, center, temperature):
        """Targets of the logits [..., K] of the teacher, and their mean."""
        rows = logits.reshape(-1, logits.shape[-1])
        if model.centering == "sinkhorn":
            return sinkhorn(rows, temperature, 3).reshape(logits.shape), center
        momentum = model.center_momentum
        return jax.nn.softmax((logits - center) / temperature), momentum * center + (1 - momentum) * rows.mean(0)

    def loss(train, state, batch, key):
        views_key, mask_key, drop_key = jax.random.split(key, 3)
        net, teacher, center = train["net"], state.mutable["teacher"]["net"], state.mutable["center"]
        for name in ("head",) if model.shared_head else ("head", "patch_head"):
            free = net[name]["prototypes"]
            net = {**net, name: {**net[name], "prototypes": jnp.where(state.step < frozen, jax.lax.stop_gradient(free), free)}}
        large, *small = by_size(views(batch["image"], views_key))
        x = to_network(large)

        seen, _ = run(calm, teacher["encoder"], {}, x, train=False)
        masked, places, chosen = draw_masks(mask_key, len(x), patches(seen).shape[1])
        of_teacher = jnp.take_along_axis(patches(seen), places[..., None], 1)
        share = jnp.minimum(1.0, state.step / max(1, warmup))
        temperature = model.teacher_temperature + share * (model.teacher_temperature_end - model.teacher_temperature)
        of_images = jax.lax.stop_gradient(head(teacher, "head", seen["pooled"]))
        of_patches = jax.lax.stop_gradient(head(teacher, "patch_head", of_teacher))
        image_targets, image_center = assign(of_images, center["image"], temperature)
        patch_targets, patch_center = assign(of_patches, center["patch"], temperature)

        h, _ = run(encoder, net["encoder"], {}, x, train=True, key=drop_key, masked=masked)
        images = [head(net, "head", h["pooled"]).reshape(*large.shape[:2], -1)]
        for i, group in enumerate(small):
            local, _ = run(encoder, net["encoder"], {}, to_network(group), train=True, key=jax.random.fold_in(drop_key, i))
            images.append(head(net, "head", local["pooled"]).reshape(*group.shape[:2], -1))
        student = head(net, "patch_head", jnp.take_along_axis(patches(h), places[..., None], 1))
        terms = {
            "image": swapped(image_targets.reshape(*large.shape[:2], -1), jnp.concatenate(images, 1) / model.temperature),
            "patch": masked_cross_entropy(patch_targets, student / model.temperature, chosen),
        }
        value = terms["image"] + model.weights.masked * terms["patch"]
        if model.weights.koleo:
            pooled = h["pooled"].reshape(*large.shape[:2], -1)
            terms["koleo"] = sum(koleo(pooled[:, i], model.koleo_group) for i in range(first)) / first
            value += model.weights.koleo * terms["koleo"]
        logs = {**terms, FEATURES: h["pooled"].reshape(*large.shape[:2], -1)}
        logs |= {"teacher_entropy": entropy(image_targets).mean(), "entropy_of_mean": entropy(image_targets.mean(0))}
        return value, ({"center": {"image": image_center, "patch": patch_center}}, logs)

    def encode(params, mutable, images):
        """Of the teacher."""
        return run(calm, mutable["teacher"]["net"]["encoder"], {}, to_input(images, model.mean, model.std), train=False)[0]

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(Phase("ssl", ("net",), loss),),
        encode=encode,
        views=views,
        after=follow(momentum_schedule(config)),
        encoder=("teacher", "net", "encoder"),
        couples_batch=True,
    )
