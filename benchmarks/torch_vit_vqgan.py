"""The tokenizer of ViT-VQGAN in PyTorch, with the same networks as ours: the reference of `accelerator.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch_vision
from torch import nn

torch_vision.torchvision()  # timm imports torchvision, whose operators must be declared
import timm  # noqa: E402

LEAST_LOG_SCALE, EPSILON = -7.0, 0.1  # of the logit-Laplace likelihood, as in ours


class Trunk(nn.Module):
    def __init__(self, tokens, size):
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, size.width))
        block = timm.models.vision_transformer.Block
        self.blocks = nn.Sequential(
            *(block(size.width, size.heads, size.hidden / size.width, qkv_bias=True) for _ in range(size.depth))
        )
        self.norm = nn.LayerNorm(size.width, eps=1e-6)

    def forward(self, x):
        return self.norm(self.blocks(x + self.positions))


class Tokenizer(nn.Module):
    """Images in [0, 1] to codes of norm 1, and back to the mean and log-scale of each value."""

    def __init__(self, pixels, size, patch=8, codes=8192, dim=32):
        super().__init__()
        width, hidden = size.width, size.hidden
        self.patch, self.side, inputs = patch, pixels // patch, 3 * patch**2
        tokens = self.side**2
        self.embed, self.encoder = nn.Linear(inputs, width), Trunk(tokens, size)
        self.encoder_tanh, self.features = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.to_code = nn.Linear(width, dim)
        self.shift = nn.Parameter(torch.zeros(dim))
        self.codebook = nn.Parameter(torch.randn(codes, dim))
        self.from_code, self.decoder = nn.Linear(dim, width), Trunk(tokens, size)
        self.decoder_tanh, self.head = nn.Linear(width, hidden), nn.Linear(hidden, 2 * inputs)

    def encode(self, x):
        b = len(x)
        x = (2 * x - 1).reshape(b, 3, self.side, self.patch, self.side, self.patch)
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(b, self.side**2, -1)
        x = self.features(torch.tanh(self.encoder_tanh(self.encoder(self.embed(x)))))
        z = self.to_code(x).float()
        return F.normalize(F.layer_norm(z, z.shape[-1:], eps=1e-6) + self.shift, dim=-1)

    def quantize(self, z):
        codebook = F.normalize(self.codebook, dim=-1)
        codes = F.embedding((z @ codebook.T).argmax(-1), codebook)
        loss = (codes - z.detach()).square().mean() + 0.25 * (z - codes.detach()).square().mean()
        return z + (codes - z).detach(), loss

    def decode(self, codes):
        out = self.head(torch.tanh(self.decoder_tanh(self.decoder(self.from_code(codes))))).float()
        out = out.reshape(len(out), self.side, self.side, self.patch, self.patch, 6).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(len(out), 6, self.side * self.patch, self.side * self.patch).chunk(2, 1)

    def forward(self, x):
        """(reconstruction, loss without the adversarial loss)"""
        codes, loss = self.quantize(self.encode(x))
        mean, log_scale = self.decode(codes)
        picture = ((torch.sigmoid(mean) - EPSILON) / (1 - 2 * EPSILON)).clamp(0, 1)
        squeezed = (1 - 2 * EPSILON) * x + EPSILON
        log_scale = log_scale.clamp(min=LEAST_LOG_SCALE)
        laplace = (torch.logit(squeezed) - mean).abs() * torch.exp(-log_scale) + log_scale
        laplace = laplace + torch.log(2 * squeezed * (1 - squeezed))
        return picture, loss + (picture - x).square().mean() + 0.1 * laplace.mean()
