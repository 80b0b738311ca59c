"""Tasks on a ResNet in eager PyTorch: the heads and losses of methods supervised, segmentation, detection and vqa.

Parts have the names of ours, so that `copy` can give them our initial weights.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Trunk(nn.Module):
    """torchvision's ResNet without its classifier: {layer1 to layer4: [B, C, h, w], pooled: [B, C]} of images in [0, 1]."""

    def __init__(self, resnet: nn.Module, mean, std, frozen: bool):
        super().__init__()
        resnet.fc = nn.Identity()
        self.resnet, self.frozen = resnet, frozen
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)
        if frozen:
            self.requires_grad_(False)

    def forward(self, images):
        net = self.resnet.train(not self.frozen)
        with torch.set_grad_enabled(not self.frozen):
            x, found = net.maxpool(net.relu(net.bn1(net.conv1((images - self.mean) / self.std)))), {}
            for name in ("layer1", "layer2", "layer3", "layer4"):
                x = found[name] = getattr(net, name)(x)
        return {**found, "pooled": x.mean((2, 3))}


class Head(nn.Module):
    """Convolutions with BatchNorm and ReLU by name."""

    def add(self, name, inputs, width, kernel=3, conv="{}_conv", norm="{}_norm"):
        setattr(self, conv.format(name), nn.Conv2d(inputs, width, kernel, padding=kernel // 2, bias=False))
        setattr(self, norm.format(name), nn.BatchNorm2d(width))

    def through(self, name, x, relu=True):
        x = getattr(self, f"{name}_norm")(getattr(self, f"{name}_conv")(x))
        return x.relu_() if relu else x


class Classifier(Head):
    def __init__(self, width, classes):
        super().__init__()
        self.classifier = nn.Linear(width, classes)

    def loss(self, layers, batch):
        return F.cross_entropy(self.classifier(layers["pooled"]), batch["label"])


class Segmenter(Head):
    """`models.tasks.segmentation.FcnHead`, its logits resized to the image, and the mean over valid pixels."""

    def __init__(self, maps, width, channels, classes, ignore):
        super().__init__()
        self.maps, self.ignore = maps, ignore
        for index in (1, 2):
            self.add(index, width if index == 1 else channels, channels, conv="conv{}", norm="bn{}")
        self.classifier = nn.Conv2d(channels, classes, 1)

    def loss(self, layers, batch):
        maps = [layers[name] for name in self.maps]
        x = torch.cat([F.interpolate(x, maps[0].shape[2:], mode="bilinear") if x is not maps[0] else x for x in maps], 1)
        for index in (1, 2):
            x = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(x)).relu_()
        logits = F.interpolate(self.classifier(x), batch["image"].shape[2:], mode="bilinear")
        return F.cross_entropy(logits, batch["mask"][..., 0].long(), ignore_index=self.ignore)


class Pyramid(Head):
    def __init__(self, widths, width):
        super().__init__()
        for level, inputs in enumerate(widths):
            self.add(f"lateral{level}", inputs, width, kernel=1)
            self.add(f"out{level}", width, width)

    def forward(self, maps):
        found, above = [], None
        for level, x in reversed(list(enumerate(maps))):
            x = self.through(f"lateral{level}", x, relu=False)
            above = x if above is None else x + F.interpolate(above, x.shape[2:], mode="bilinear")
            found.insert(0, self.through(f"out{level}", above))
        return found


class Detector(Head):
    """`models.tasks.detection.Points` with the losses of `objectives.detection.point_losses`; no ignored objects."""

    def __init__(self, maps, widths, width, classes, doublings, weights):
        super().__init__()
        self.maps, self.classes, self.doublings, self.weights = maps, classes, doublings, weights
        self.pyramid = Pyramid(widths, width)
        for index in range(doublings):
            self.add(f"double{index}", width, width)
        for name, channels in (("heat", classes), ("size", 2), ("offset", 2)):
            setattr(self, f"{name}_conv", nn.Conv2d(width, width, 3, padding=1))
            setattr(self, name, nn.Conv2d(width, channels, 1))

    def loss(self, layers, batch):
        x = self.pyramid([layers[name] for name in self.maps])[0]
        for index in range(self.doublings):
            x = self.through(f"double{index}", F.interpolate(x, scale_factor=2, mode="bilinear"))
        heat, size, offset = (getattr(self, name)(getattr(self, f"{name}_conv")(x).relu_()) for name in ("heat", "size", "offset"))
        boxes, labels, usable = batch["boxes"], batch["box_label"], batch["boxes_valid"]
        grid = torch.tensor(x.shape[2:], dtype=torch.float32)
        centers, sizes = (boxes[..., :2] + boxes[..., 2:]) / 2 * grid, (boxes[..., 2:] - boxes[..., :2]) * grid
        cells = torch.minimum(centers.floor().clamp(min=0), grid - 1)
        target = self.heat_map(cells, sizes, labels, usable, x.shape[2:])
        peak = (1 - heat.sigmoid()) ** 2 * F.logsigmoid(heat)
        other = (1 - target) ** 4 * heat.sigmoid() ** 2 * F.logsigmoid(-heat)
        count = usable.sum().clamp(min=1)
        losses = {"heat": -torch.where(target == 1, peak, other).sum() / count}
        place = (cells[..., 0] * x.shape[3] + cells[..., 1]).long()
        for name, found, wanted in (("size", size, sizes), ("offset", offset, centers - cells)):
            at_centers = found.flatten(2).gather(2, place[:, None].expand(-1, 2, -1)).transpose(1, 2)
            losses[name] = torch.where(usable[..., None], (at_centers - wanted).abs(), 0).sum() / count
        return sum(self.weights[name] * value for name, value in losses.items())

    def heat_map(self, cells, sizes, labels, usable, shape):
        height, width = sizes.unbind(-1)
        around, area, overlap = height + width, height * width, 0.7
        moved = (1 - overlap) / (1 + overlap) * area
        radius = torch.stack([
            2 * moved / (around + (around**2 - 8 * moved).clamp(min=0).sqrt()),
            (1 - overlap) * area / (around + (around**2 - 4 * (1 - overlap) * area).clamp(min=0).sqrt()),
            (1 / overlap - 1) * area / (around + (around**2 + 4 * (1 / overlap - 1) * area).sqrt()),
        ]).amin(0).floor()[..., None, None]  # fmt: skip
        y = torch.arange(shape[0])[:, None] - cells[..., 0, None, None]
        x = torch.arange(shape[1])[None] - cells[..., 1, None, None]
        bump = torch.exp(-(y**2 + x**2) / (2 * ((2 * radius + 1) / 6) ** 2))
        bump = torch.where((torch.maximum(y.abs(), x.abs()) <= radius) & usable[..., None, None], bump, 0)
        heat = torch.zeros(len(bump), self.classes, *shape)
        return heat.scatter_reduce(1, labels.long()[..., None, None].expand_as(bump), bump, "amax")


class Answerer(Head):
    """`models.tasks.vqa`: a GRU, and FiLM on one map."""

    def __init__(self, layer, inputs, words, answers, embedding, state, width, blocks, projection, hidden):
        super().__init__()
        self.layer, self.blocks = layer, blocks
        self.embed = nn.Embedding(words, embedding)
        self.gru = nn.GRU(embedding, state, batch_first=True)
        self.stem, self.stem_bn = nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.film = nn.Linear(state, 2 * blocks * width)
        for block in range(blocks):
            setattr(self, f"block{block}_in", nn.Conv2d(width + 2, width, 1))
            setattr(self, f"block{block}_conv", nn.Conv2d(width, width, 3, padding=1, bias=False))
            setattr(self, f"block{block}_bn", nn.BatchNorm2d(width, affine=False))
        self.projection, self.hidden = nn.Conv2d(width + 2, projection, 1), nn.Linear(projection, hidden, bias=False)
        self.hidden_bn, self.answers = nn.BatchNorm1d(hidden), nn.Linear(hidden, answers)

    def loss(self, layers, batch):
        lengths = (batch["question"] != 0).sum(1).clamp(min=1)
        words = nn.utils.rnn.pack_padded_sequence(self.embed(batch["question"]), lengths, batch_first=True, enforce_sorted=False)
        film = self.film(self.gru(words)[1][0]).view(len(lengths), self.blocks, 2, -1, 1, 1)
        x = self.stem_bn(self.stem(layers[self.layer])).relu_()
        for block in range(self.blocks):
            x = getattr(self, f"block{block}_in")(with_coordinates(x)).relu_()
            y = getattr(self, f"block{block}_bn")(getattr(self, f"block{block}_conv")(x))
            x = x + ((1 + film[:, block, 0]) * y + film[:, block, 1]).relu_()
        x = self.projection(with_coordinates(x)).relu_().amax((2, 3))
        logits = self.answers(self.hidden_bn(self.hidden(x)).relu_())
        return F.cross_entropy(logits, batch["answer"])


def with_coordinates(x):
    rows, columns = (torch.linspace(-1, 1, n) for n in x.shape[2:])
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    return torch.cat([x, grid.expand(len(x), -1, -1, -1)], 1)


def copy(head: nn.Module, ours: dict) -> None:
    """Gives `head` the weights of our parameters {part: tree} by name. Raises KeyError for one without a place."""
    places = dict(head.named_parameters())

    def put(name, value):
        value = np.asarray(value)
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T if value.ndim == 2 and "embed" not in name else value
        with torch.no_grad():
            places[name].copy_(torch.tensor(value.copy()).view_as(places[name]))

    def walk(tree, path):
        for name, value in tree.items():
            if isinstance(value, dict):
                walk(value, (*path, name))
            else:
                put(".".join((*path, "bias" if name == "bias" else "weight")), value)

    trees = dict(ours)
    if "cell" in trees:
        _copy_gru(head.gru, trees.pop("cell"))
    walk(trees, ())


def _copy_gru(gru: nn.GRU, cell: dict) -> None:
    """Flax has one bias where PyTorch has two: the second one of the gates is 0."""
    def stacked(letter, leaf):
        return torch.tensor(np.concatenate([np.asarray(cell[letter + gate][leaf]).T for gate in "rzn"]))

    with torch.no_grad():
        gru.weight_ih_l0.copy_(stacked("i", "kernel"))
        gru.weight_hh_l0.copy_(stacked("h", "kernel"))
        gru.bias_ih_l0.copy_(stacked("i", "bias"))
        gru.bias_hh_l0.zero_()
        gru.bias_hh_l0[-gru.hidden_size :].copy_(torch.tensor(np.asarray(cell["hn"]["bias"])))
