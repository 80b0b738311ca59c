"""Visual question answering: a classifier of answers that reads an image through a pretrained encoder, and a question.

    question -> GRU or bag of words -> q;  image -> backbone -> maps;  softmax over answers of fusion(maps, q)

Fusion by FiLM (Perez et al. 2018, arXiv:1709.07871) or stacked attention (Yang et al. 2016, arXiv:1511.02274). Many questions can be
guessed without looking (Goyal et al. 2017, arXiv:1612.00837), so `image="none"` trains the same network without an image, and the
evaluation `vqa` asks about other images.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.engine.backbone import feature_map, open_backbone
from ssl_jax.engine.method import Method, ModelFns, Phase, Spec
from ssl_jax.errors import UserError
from ssl_jax.models.build import build as build_by_name
from ssl_jax.models.common import create, run
from ssl_jax.models.tasks.vqa import FUSIONS, QUESTIONS
from ssl_jax.objectives.classification import cross_entropy

IMAGES = ("read", "none")


def build(config, stages) -> Method:
    """`config.model`: backbone ('frozen' or 'trained') and layer (see `engine.backbone`); image ('read', or 'none': features are
    zeros); question (a name in `QUESTIONS` with its fields, and length, the most words of a question); fusion (a name in `FUSIONS`
    with its fields). `config.data.vocabulary` names question and answer, which become token ids and classes.
    """
    model, sizes = config.model, config.data.vocabulary
    if model.image not in IMAGES:
        raise UserError(f"config.model.image={model.image!r} is unknown; choose {' or '.join(IMAGES)}")
    for name in ("question", "answer"):
        if not sizes.get(name):
            raise UserError(f"method 'vqa' reads {name!r} by its vocabulary; give --config.data.vocabulary.{name}=None")
    if sizes.answer < 2:
        raise UserError(f"method 'vqa' on {config.data.name!r}: the train split has one answer only; nothing is to be learned")
    backbone = open_backbone(config, stages)
    fields = dict(model.question)
    length = fields.pop("length")
    parts = {
        "question": build_by_name(QUESTIONS, "question", fields, words=sizes.question, dtype=config.dtype),
        "fusion": build_by_name(FUSIONS, "fusion", model.fusion, answers=sizes.answer, dtype=config.dtype),
    }

    def maps_of(net, stats, frozen, images, train):
        layers, stats = backbone.read(net, stats, frozen, images, train)
        maps = feature_map(layers, model.layer)
        return jnp.zeros_like(maps) if model.image == "none" else maps, stats

    def forward(net, stats, frozen, batch, train):
        """((logits [B, answers], attention [B, h, w]), new statistics)"""

        def through(name, *inputs):
            out, state = run(parts[name], net[name], {"batch_stats": stats[name]}, *inputs, train=train)
            return out, {name: state["batch_stats"]}

        maps, new = maps_of(net, stats, frozen, batch["image"], train)
        question, of_question = through("question", batch["question"])
        out, of_fusion = through("fusion", maps, question)
        return out, {**new, **of_question, **of_fusion}

    def init(key, batch, frozen):
        keys = jax.random.split(key)
        net, stats = backbone.init(frozen)
        maps, _ = maps_of(net, stats, frozen, batch["image"], True)
        net["question"], _ = create(parts["question"], keys[0], batch["question"])
        question, _ = run(parts["question"], net["question"], {}, batch["question"], train=True)
        net["fusion"], state = create(parts["fusion"], keys[1], maps, question)
        return {"net": net}, {"batch_stats": {**stats, "question": {}, "fusion": state.get("batch_stats", {})}}

    def loss(train, state, batch, key):
        (logits, _), stats = forward(train["net"], state.mutable["batch_stats"], state.frozen, batch, train=True)
        value, logs = cross_entropy(logits, batch["answer"])
        return value, ({"batch_stats": stats}, logs)

    def answer(params, mutable, batch):
        (logits, attention), _ = forward(params["net"], mutable["batch_stats"], mutable, batch, train=False)
        return {"logits": logits, "attention": attention}

    def encode(params, mutable, images):
        return backbone.read(params["net"], mutable["batch_stats"], mutable, images, False)[0]

    return Method(
        inputs={
            "image": Spec(tuple(config.data.image_shape)),
            "question": Spec((length,), "int32"),
            "answer": Spec((), "int32"),
        },
        init=init,
        phases=(Phase("vqa", ("net",), loss),),
        encode=encode,
        fns=ModelFns(answer=answer),
        encoder=backbone.encoder,
        encoder_stats=backbone.encoder_stats,
        reads="the image as the encoder of the stage 'backbone' does",
        notes={} if model.image == "read" else {"image": "none"},
    )
