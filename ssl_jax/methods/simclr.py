"""SimCLR v1 and v2: contrastive learning; two views of an image are positives, all other views of the global batch negatives.

Chen et al. 2020a, "A simple framework for contrastive learning of visual representations" (arXiv:2002.05709), algorithm 1;
Chen et al. 2020b, "Big self-supervised models are strong semi-supervised learners" (arXiv:2006.10029): a deeper head, selective
kernels, and fine-tuning from the first hidden layer of the head ('head1' of `encode`; see `supervised`).
"""

from __future__ import annotations

import jax

from ssl_jax.augment.pixels import to_input
from ssl_jax.augment.views import make_views
from ssl_jax.engine.method import FEATURES, Method, Phase, Spec
from ssl_jax.errors import UserError
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.build import construct
from ssl_jax.models.common import apply, init_variables
from ssl_jax.models.heads import ProjectionHead
from ssl_jax.objectives.contrastive import loss_of_views


def build(config, stages) -> Method:
    """`config.model`: encoder (see `build_encoder`), head (fields of ProjectionHead), loss, temperature and similarities (see
    `objectives.contrastive`; the paper's loss is 'nt_xent', the official code's 'nt_xent_sum'), mean and std of the input.
    """
    model = config.model
    if config.batch_size < 2:
        raise UserError(f"config.batch_size={config.batch_size}: one image has no negatives, and the loss is 0; give 2 or more")
    objective = loss_of_views(model.loss, model.temperature, model.similarities)
    encoder = build_encoder(model.encoder, config.dtype)
    head = construct(ProjectionHead, "head", model.head, dtype=config.dtype)
    views = make_views(config.views)
    if hasattr(config.views, "keys") or len(config.views) != 2:
        there = "groups" if hasattr(config.views, "keys") else len(config.views)
        raise UserError(f"config.method='simclr' compares two views of an image, and config.views has {there}; give two recipes")

    def init(key, batch, frozen):
        first, second = jax.random.split(key)
        x = views(batch["image"], key)[:, 0]
        params, stats = init_variables(encoder, first, x)
        h, _ = apply(encoder, params, stats, x, train=True)
        head_params, head_stats = init_variables(head, second, h["pooled"])
        return (
            {"net": {"encoder": params, "head": head_params}},
            {"batch_stats": {"encoder": stats, "head": head_stats}},
        )

    def loss(train, state, batch, key):
        net, stats = train["net"], state.mutable["batch_stats"]
        x = views(batch["image"], key)  # [B, 2, h, w, 3]
        pairs = x.shape[:2]
        x = to_input(x.reshape(-1, *x.shape[2:]), model.mean, model.std)  # one pass, so that BatchNorm sees both views
        h, encoder_stats = apply(encoder, net["encoder"], stats["encoder"], x, train=True)
        z, head_stats = apply(head, net["head"], stats["head"], h["pooled"], train=True)
        value, logs = objective(z[-1].reshape(*pairs, -1))
        logs = {**logs, FEATURES: h["pooled"].reshape(*pairs, -1)}
        return value, ({"batch_stats": {"encoder": encoder_stats, "head": head_stats}}, logs)

    def encode(params, mutable, images):
        net, stats = params["net"], mutable["batch_stats"]
        x = to_input(images, model.mean, model.std)
        h, _ = apply(encoder, net["encoder"], stats["encoder"], x, train=False)
        z, _ = apply(head, net["head"], stats["head"], h["pooled"], train=False)
        return {**h, **{f"head{i}": hidden for i, hidden in enumerate(z[1:-1], 1)}, "projection": z[-1]}

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(Phase("ssl", ("net",), loss),),
        encode=encode,
        views=views,
        encoder=("net", "encoder"),
        couples_batch=True,
    )
