"""Visual question answering on a pretrained encoder: FiLM (Perez et al. 2018, arXiv:1709.07871) or stacked attention.

  python launch.py train --config=configs/simclr.py --workdir=runs/simclr
  python launch.py train --config=configs/vqa.py --config.stages.backbone.workdir=runs/simclr --workdir=runs/vqa
  python launch.py configs vqa

`--config.data.vocabulary` holds the words of the questions and all answers. Other data need the features image, question (text) and
answer: a label, or text with `--config.data.kinds.answer=phrase`.
"""

import ml_collections

from configs import common
from configs.common import Variant


def scenes(config):
    config.batch_size, config.total = 64, "40 epochs"
    config.data.vocabulary = dict(question=None, answer=None)
    config.stages = dict(backbone=common.backbone("configs/simclr.py"))
    config.model = dict(
        backbone="frozen",
        layer="layer3",  # 6 x 6 places: the last layer has 3 x 3, too few to count pebbles
        image="read",
        question=dict(name="gru", embedding=32, width=128, length=8),
        fusion=dict(name="film", width=64, blocks=2, projection=128, hidden=128),
    )
    config.optim = dict(net=dict(name="adamw", lr=2e-3, weight_decay=1e-4, warmup="1 epoch", lr_multipliers=common.SAME))
    config.evals = dict(vqa=dict(kind="vqa"))
    config.evaluate_every, config.checkpoint_every = "10 epochs", "2 epochs"
    config.baselines, config.best_metric = (), "vqa/accuracy"


def smoke(config):
    scenes(config)
    config.stages.backbone.recipe = "configs/simclr.py:smoke"
    common.shrink(config, {
        "model.question.embedding": 8,
        "model.question.width": 16,
        "model.fusion": dict(name="film", width=16, blocks=1, projection=16, hidden=16),
        "optim.net.lr": 1e-2,  # answers start at zero, so a rate that falls within eight steps would show nothing
        "optim.net.schedule": "constant",
        "optim.net.warmup": "0.1 epochs",
    })  # fmt: skip


def attention(config):
    scenes(config)
    config.model.fusion = dict(name="attention", width=128, attended=128, hops=2, hidden=128)


def question_only(config):
    """The network of the default, whose features are zeros: what can be answered without looking."""
    scenes(config)
    config.model.image = "none"


def finetune(config):
    """The encoder is trained with the task, at a tenth of its learning rate."""
    scenes(config)
    config.model.backbone = "trained"
    config.optim.net.lr_multipliers = common.SLOWER_BACKBONE


def scratch(config):
    """The same network from the initial weights of the encoder, all at one learning rate."""
    scenes(config)
    config.stages.backbone.untrained = True
    config.model.backbone = "trained"


def easy_vqa(config):
    """64 x 64 pixels and 107 questions; three quarters of them ask for yes or no. 20 epochs."""
    scenes(config)
    config.data.name = "easy_vqa"
    config.stages.backbone.recipe = "configs/simclr.py:cifar10_small"
    config.model.question.length = 12
    config.total = "20 epochs"
    config.optim.net.warmup = "1 epoch"
    config.evaluate_every, config.checkpoint_every = "20 epochs", "1 epoch"


def easy_vqa_question_only(config):
    easy_vqa(config)
    config.model.image = "none"


def clevr_film(config):
    """FiLM: GRU of 4096 on words of 200, four blocks of 128 channels, Adam 3e-4, decay 1e-5, batch 64, 1024 maps of a third stage.

    Changed: the maps are of a ResNet-50 trained here, not of a ResNet-101, and of whole images of 320 x 480 pixels (20 x 30 places);
    published images are squeezed to 224 x 224 (14 x 14 places), and the host only crops. 20 epochs are ours. Prepare the data by
    `tfds build clevr --file_format array_record`.
    """
    scenes(config)
    config.data.name, config.data.test_split = "clevr/questions", "validation"
    config.data.workers = 16
    config.total = "20 epochs"
    config.stages.backbone.recipe = "configs/supervised.py:imagenet"
    config.model.layer = "layer3"
    config.model.question = dict(name="gru", embedding=200, width=4096, length=64)
    config.model.fusion = dict(name="film", width=128, blocks=4, projection=512, hidden=1024)
    everything = ((".*", 1.0),)  # as torch.optim.Adam decays
    config.optim = dict(net=dict(name="adam", lr=3e-4, schedule="constant", weight_decay=1e-5, weight_decay_mask=everything))
    config.evals.vqa = dict(kind="vqa", examples=150_000, train_examples=20_000)
    config.evaluate_every, config.checkpoint_every, config.log_every_steps = "1 epoch", "0.25 epochs", 50


VARIANTS = (
    Variant("", scenes, "embedded scenes, FiLM on a frozen run of configs/simclr.py, 40 epochs", hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("attention", attention, "two hops of attention instead of FiLM", hardware="2 CPU cores"),
    Variant("question_only", question_only, "the default without the image: a baseline", hardware="2 CPU cores"),
    Variant("finetune", finetune, "the encoder is trained, too, at a tenth of the learning rate", hardware="2 CPU cores"),
    Variant("scratch", scratch, "the same network from its initial weights: give any run of the recipe as the stage",
            hardware="2 CPU cores"),
    Variant("easy_vqa", easy_vqa, "easy-VQA (a TFDS directory of yours), on a run of configs/simclr.py:cifar10_small, 20 epochs",
            hardware="2 CPU cores"),
    Variant("easy_vqa_question_only", easy_vqa_question_only, "the same without the image", hardware="2 CPU cores"),
    Variant("clevr_film", clevr_film, "CLEVR: GRU 4096, four blocks of 128, on the third stage of a frozen ResNet-50",
            hardware="1 accelerator"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("vqa", VARIANTS, variant)
