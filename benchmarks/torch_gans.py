"""Small BigGAN and StyleGAN2 in PyTorch, with the same networks as ours: the reference of `adversarial_step.py`."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

# ---------------------------------------------------------------- BigGAN


def conv(inputs, outputs, kernel=3, bias=True):
    return spectral_norm(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias))


class NonLocal(nn.Module):
    """Attention of all pixels to 2 x 2 maxima."""

    def __init__(self, channels):
        super().__init__()
        narrow, half = max(channels // 8, 1), max(channels // 2, 1)
        self.query, self.key = conv(channels, narrow, 1, False), conv(channels, narrow, 1, False)
        self.value, self.output = conv(channels, half, 1, False), conv(half, channels, 1, False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        queries, keys = self.query(x).flatten(2), F.max_pool2d(self.key(x), 2).flatten(2)
        values = F.max_pool2d(self.value(x), 2).flatten(2)
        mixed = F.scaled_dot_product_attention(queries.mT, keys.mT, values.mT, scale=1.0).mT
        mixed = mixed.reshape(len(x), -1, *x.shape[2:]).contiguous(memory_format=torch.channels_last)
        return x + self.gamma * self.output(mixed)


class ConditionalNorm(nn.Module):
    def __init__(self, channels, condition):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain = spectral_norm(nn.Linear(condition, channels, bias=False))
        self.shift = spectral_norm(nn.Linear(condition, channels, bias=False))

    def forward(self, x, c):
        return torch.addcmul(self.shift(c)[:, :, None, None], self.norm(x), 1 + self.gain(c)[:, :, None, None])


class GeneratorBlock(nn.Module):
    def __init__(self, inputs, outputs, condition):
        super().__init__()
        self.norm1, self.norm2 = ConditionalNorm(inputs, condition), ConditionalNorm(outputs, condition)
        self.conv1, self.conv2, self.shortcut = conv(inputs, outputs), conv(outputs, outputs), conv(inputs, outputs, 1)

    def forward(self, x, c):
        h = F.interpolate(F.relu(self.norm1(x, c)), scale_factor=2)
        h = self.conv2(F.relu(self.norm2(self.conv1(h), c)))
        return h + F.interpolate(self.shortcut(x), scale_factor=2)


class BigGANGenerator(nn.Module):
    def __init__(self, channels, multiples, classes, embedding, latent, pixels=32, attention=0):
        super().__init__()
        self.widths = [channels * m for m in multiples]
        self.base, self.chunk = pixels >> (len(multiples) - 1), latent // len(multiples)
        sides = [self.base << i for i in range(1, len(multiples))]
        attends = zip(sides, self.widths[1:], strict=True)
        self.attention = nn.ModuleList(NonLocal(w) if side == attention else nn.Identity() for side, w in attends)
        self.embed = nn.Embedding(classes, embedding)
        self.project = spectral_norm(nn.Linear(self.chunk, self.base**2 * self.widths[0]))
        pairs = itertools.pairwise(self.widths)
        self.blocks = nn.ModuleList(GeneratorBlock(a, b, embedding + self.chunk) for a, b in pairs)
        self.norm, self.last = nn.BatchNorm2d(self.widths[-1]), conv(self.widths[-1], 3)

    def forward(self, z, label):
        first, *chunks = z.split(self.chunk, 1)
        label = self.embed(label)
        x = self.project(first).view(len(z), self.widths[0], self.base, self.base).to(memory_format=torch.channels_last)
        for block, attend, chunk in zip(self.blocks, self.attention, chunks, strict=True):
            x = attend(block(x, torch.cat([label, chunk], 1)))
        return torch.tanh(self.last(F.relu(self.norm(x))))


class DiscriminatorBlock(nn.Module):
    def __init__(self, inputs, outputs, first, down):
        super().__init__()
        self.first, self.down = first, down
        self.conv1, self.conv2 = conv(inputs, outputs), conv(outputs, outputs)
        self.shortcut = conv(inputs, outputs, 1) if inputs != outputs or down else nn.Identity()

    def forward(self, x):
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        return h + self.shortcut(x)


class BigGANDiscriminator(nn.Module):
    def __init__(self, channels, multiples, halved, classes, pixels=32, attention=0):
        super().__init__()
        widths, blocks = [3, *(channels * m for m in multiples)], []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            blocks.append(DiscriminatorBlock(a, b, i == 0, i < halved))
            if i < halved and pixels >> (i + 1) == attention:
                blocks.append(NonLocal(b))
        self.blocks = nn.Sequential(*blocks)
        self.linear = spectral_norm(nn.Linear(widths[-1], 1))
        self.embed = spectral_norm(nn.Embedding(classes, widths[-1]))

    def forward(self, x, label):
        h = F.relu(self.blocks(x)).sum((2, 3))
        return self.linear(h)[:, 0] + (self.embed(label) * h).sum(1)


# ---------------------------------------------------------------- StyleGAN2

TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0])


def fir(channels, gain=1.0):
    kernel = torch.outer(TAPS, TAPS)
    return (kernel / kernel.sum() * gain).expand(channels, 1, 4, 4).contiguous()


def smooth(x, padding, gain=1.0):
    return F.conv2d(
        F.pad(x, (padding[0], padding[1], padding[0], padding[1])), fir(x.shape[1], gain), groups=x.shape[1]
    )


def upsample(x):
    with_zeros = F.conv_transpose2d(x, torch.ones(x.shape[1], 1, 1, 1), stride=2, output_padding=1, groups=x.shape[1])
    return smooth(with_zeros, (2, 1), 4.0)


def leaky(x):
    return 2**0.5 * F.leaky_relu(x, 0.2)


class EqualLinear(nn.Module):
    def __init__(self, inputs, outputs, multiplier=1.0, bias=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / multiplier)
        self.bias = nn.Parameter(torch.full((outputs,), bias / multiplier))
        self.scale, self.multiplier = multiplier / inputs**0.5, multiplier

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias * self.multiplier)


class EqualConv(nn.Module):
    def __init__(self, inputs, outputs, kernel=3, down=False, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.scale, self.pad, self.down = 1 / (inputs * kernel**2) ** 0.5, kernel // 2, down

    def forward(self, x):
        weight = self.weight * self.scale
        if not self.down:
            return F.conv2d(x, weight, self.bias, padding=self.pad)
        return F.conv2d(smooth(x, (1 + self.pad, 1 + self.pad)), weight, self.bias, stride=2)


class Modulated(nn.Module):
    """Scales the input by the style and the output by the norms, as ours: faster than a kernel per image."""

    def __init__(self, inputs, outputs, features, kernel=3, up=False, demodulate=True):
        super().__init__()
        self.style = EqualLinear(features, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.scale, self.up, self.demodulate, self.pad = 1 / (inputs * kernel**2) ** 0.5, up, demodulate, kernel // 2

    def forward(self, x, w):
        style, weight = self.style(w), self.weight * self.scale
        x = x * style[:, :, None, None]
        if self.up:
            x = smooth(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), (1, 1), 4.0)
        else:
            x = F.conv2d(x, weight, padding=self.pad)
        if self.demodulate:
            x = x * torch.rsqrt(style**2 @ weight.square().sum((2, 3)).T + 1e-8)[:, :, None, None]
        return x


class Layer(nn.Module):
    def __init__(self, inputs, outputs, features, up=False):
        super().__init__()
        self.conv = Modulated(inputs, outputs, features, up=up)
        self.strength, self.bias = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(outputs))

    def forward(self, x, w):
        x = self.conv(x, w)
        noise = torch.randn(len(x), 1, *x.shape[2:])
        return leaky(x + self.strength * noise + self.bias[:, None, None])


class StyleGAN2(nn.Module):
    def __init__(self, resolution, base, widest, features, mapping_layers):
        super().__init__()
        self.resolutions = [4 * 2**i for i in range(resolution.bit_length() - 2)]
        width = {r: min(base // r, widest) for r in self.resolutions}
        self.mapping = nn.ModuleList(EqualLinear(features, features, 0.01) for _ in range(mapping_layers))
        self.constant = nn.Parameter(torch.randn(width[4], 4, 4))
        self.ups = nn.ModuleList(Layer(width[r // 2], width[r], features, up=True) for r in self.resolutions[1:])
        self.layers = nn.ModuleList(Layer(width[r], width[r], features) for r in self.resolutions)
        self.colors = nn.ModuleList(Modulated(width[r], 3, features, 1, demodulate=False) for r in self.resolutions)
        self.biases = nn.ParameterList(torch.zeros(3) for _ in self.resolutions)

    def map(self, z):
        z = z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)
        for layer in self.mapping:
            z = leaky(layer(z))
        return z

    def synthesize(self, ws):
        x, image, index = self.constant.expand(len(ws), -1, -1, -1).to(memory_format=torch.channels_last), None, 0
        for i in range(len(self.resolutions)):
            if i:
                x, index = self.ups[i - 1](x, ws[:, index]), index + 1
            x, index = self.layers[i](x, ws[:, index]), index + 1
            color = self.colors[i](x, ws[:, index]) + self.biases[i][:, None, None]
            image = color if image is None else upsample(image) + color
        return image


class StyleGAN2Discriminator(nn.Module):
    def __init__(self, resolution, base, widest, group):
        super().__init__()
        self.group, sizes = group, [resolution >> i for i in range(resolution.bit_length() - 3)]
        width = {r: min(base // r, widest) for r in [*sizes, 4]}
        self.rgb = EqualConv(3, width[resolution], 1)
        self.first = nn.ModuleList(EqualConv(width[r], width[r]) for r in sizes)
        self.second = nn.ModuleList(EqualConv(width[r], width[r // 2], down=True) for r in sizes)
        self.shortcut = nn.ModuleList(EqualConv(width[r], width[r // 2], 1, down=True, bias=False) for r in sizes)
        self.last = EqualConv(width[4] + 1, width[4])
        self.dense, self.logits = EqualLinear(width[4] * 16, width[4]), EqualLinear(width[4], 1)

    def forward(self, x):
        x = leaky(self.rgb(x))
        for first, second, shortcut in zip(self.first, self.second, self.shortcut, strict=True):
            x = (leaky(second(leaky(first(x)))) + shortcut(x)) / 2**0.5
        grouped = x.reshape(-1, self.group, *x.shape[1:])
        deviation = (grouped.var(1, correction=0) + 1e-8).sqrt().mean((1, 2, 3)).repeat_interleave(self.group)
        x = torch.cat([x, deviation[:, None, None, None].expand(-1, 1, *x.shape[2:])], 1)
        return self.logits(leaky(self.dense(leaky(self.last(x)).flatten(1))))[:, 0]
