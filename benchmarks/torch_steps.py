"""Train steps in PyTorch, the reference of `accelerator.py`: each function returns (step: images, labels -> loss, parameters).

`size` is that of `accelerator_cases.py`. Networks, losses and numbers of parameters are those of our steps; `accelerator.py` checks
the last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerator_cases import Size
from torch import nn
from train_step import references, torch_nt_xent

ENCODERS = references()  # before timm is imported: it declares torchvision's operators


def size_of(*modules) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def amp():
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)


def update(optimizer, loss):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def simclr(size: Size):
    features, layout = {18: 512, 50: 2048}[size.network], torch.channels_last
    head = [nn.Linear(features, features, bias=False), nn.BatchNorm1d(features), nn.ReLU()]
    head += [nn.Linear(features, 128, bias=False), nn.BatchNorm1d(128)]
    model = nn.Sequential(ENCODERS[f"resnet{size.network}"](), *head).to(memory_format=layout)
    model[-1].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)

    @torch.compile
    def loss(images):
        x = (images.flatten(0, 1).float() / 255).contiguous(memory_format=layout)
        with amp():
            z = model(x)
        return torch_nt_xent(z.float().unflatten(0, (-1, 2)))

    return lambda images, labels: update(optimizer, loss(images)), size_of(model) - 128


def vit(size: Size):
    import timm

    from ssl_jax.models.backbones.vit import parse_variant

    of, patch = parse_variant(size.network)
    model = timm.models.VisionTransformer(
        size.pixels, patch, embed_dim=of.width, depth=of.depth, num_heads=of.heads, mlp_ratio=of.hidden / of.width
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    @torch.compile
    def loss(images, labels):
        with amp():
            logits = model(images.float() / 127.5 - 1)
        return F.cross_entropy(logits.float(), labels, label_smoothing=0.1)

    return lambda images, labels: update(optimizer, loss(images, labels)), size_of(model)


def masked_vit(size: Size):
    import timm
    from masked_vit import KEPT, decoder_of

    from ssl_jax.models.backbones.vit import parse_variant, sincos2d

    (of, patch), decoder = parse_variant(size.network), decoder_of(size.network)
    side = size.pixels // patch
    count, kept, width = side**2, int(KEPT * side**2), decoder["width"]
    block = timm.models.vision_transformer.Block
    model = nn.ModuleDict(dict(
        embed=nn.Linear(3 * patch**2, of.width),
        blocks=nn.Sequential(*(block(of.width, of.heads, of.hidden / of.width, qkv_bias=True) for _ in range(of.depth))),
        norm=nn.LayerNorm(of.width, eps=1e-6),
        decoder_embed=nn.Linear(of.width, width),
        decoder=nn.Sequential(*(block(width, decoder["heads"], 4.0, qkv_bias=True) for _ in range(decoder["depth"]))),
        decoder_norm=nn.LayerNorm(width, eps=1e-6),
        pixels=nn.Linear(width, 3 * patch**2),
        rows=nn.ParameterDict(dict(cls=torch.zeros(1, 1, of.width), mask=torch.zeros(1, 1, width))),
    ))  # fmt: skip
    places, decoder_places = (
        torch.tensor(sincos2d((side, side), w).copy(), device=torch.get_default_device()) for w in (of.width, width)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    @torch.compile
    def loss(images):
        b = len(images)
        x = (
            (images.float() / 127.5 - 1)
            .reshape(b, 3, side, patch, side, patch)
            .permute(0, 2, 4, 3, 5, 1)
            .reshape(b, count, -1)
        )
        order = torch.rand(b, count, device=x.device).argsort(1)
        back = order.argsort(1)

        def take(x, index):
            return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[-1]))

        with amp():
            seen = take(model["embed"](x) + places, order[:, :kept])
            h = model["norm"](model["blocks"](torch.cat([model["rows"]["cls"].expand(b, -1, -1), seen], 1)))
            h = model["decoder_embed"](h)
            every = take(torch.cat([h[:, 1:], model["rows"]["mask"].to(h.dtype).expand(b, count - kept, -1)], 1), back)
            h = model["decoder"](torch.cat([h[:, :1], every + decoder_places], 1))
            predicted = model["pixels"](model["decoder_norm"](h)[:, 1:]).float()
        target = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + 1e-6)
        hidden = (back >= kept).float()
        return ((predicted - target).square().mean(-1) * hidden).sum() / hidden.sum()

    return lambda images, labels: update(optimizer, loss(images)), size_of(model)


def vit_vqgan(size: Size):
    import torch_gans
    from torch_vit_vqgan import Tokenizer

    from ssl_jax.models.tokenizers.vit_vqgan import SIZES

    torch_gans.TAPS = torch_gans.TAPS.to(torch.get_default_device())
    tokenizer = Tokenizer(size.pixels, SIZES[size.network])
    base, widest = (128, 16) if size.network == "mu" else (16_384, 512)
    discriminator = torch_gans.StyleGAN2Discriminator(size.pixels, base, widest, group=1).to(
        memory_format=torch.channels_last
    )
    options = dict(lr=1e-4, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    optimizers = [torch.optim.AdamW(module.parameters(), **options) for module in (tokenizer, discriminator)]

    def score(x):
        return discriminator((2 * x - 1).contiguous(memory_format=torch.channels_last))

    @torch.compile
    def tokenizer_loss(images):
        with amp():
            picture, loss = tokenizer(images.float() / 255)
            return loss + 0.1 * F.softplus(-score(picture).float()).mean()

    @torch.compile
    def reconstruct(images):
        with amp(), torch.no_grad():
            return tokenizer(images.float() / 255)[0]

    @torch.compile
    def discriminator_loss(images, picture):
        with amp():
            real, fake = score(images.float() / 255).float(), score(picture).float()
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    def train(images, labels):
        discriminator.requires_grad_(False)
        loss = update(optimizers[0], tokenizer_loss(images))
        discriminator.requires_grad_(True)
        update(optimizers[1], discriminator_loss(images, reconstruct(images)))
        return loss

    return train, size_of(tokenizer, discriminator)


def biggan(size: Size):
    import torch_gans

    from ssl_jax.models.gan.biggan import DISCRIMINATOR, GENERATOR

    pixels, latent, classes = size.pixels, 120, 1000
    attention, halved = (16, 2) if pixels == 32 else (64, len(DISCRIMINATOR[pixels]) - 1)

    def generator_of():
        fields = dict(classes=classes, embedding=128, latent=latent, pixels=pixels, attention=attention)
        return torch_gans.BigGANGenerator(size.network, GENERATOR[pixels], **fields).to(
            memory_format=torch.channels_last
        )

    generator, averaged = generator_of(), generator_of()
    discriminator = torch_gans.BigGANDiscriminator(
        size.network, DISCRIMINATOR[pixels], halved, classes, pixels, attention
    )
    discriminator.to(memory_format=torch.channels_last)
    options = dict(betas=(0.0, 0.999), fused=True)
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=5e-5, **options)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, **options)

    @torch.compile
    def discriminator_loss(images, labels, z, y):
        with amp():
            with torch.no_grad():
                fake = generator(z, y)
            real = (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            on_real, on_fake = discriminator(torch.cat([real, fake]), torch.cat([labels, y])).float().chunk(2)
        return F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()

    @torch.compile
    def generator_loss(z, y):
        with amp():
            return -discriminator(generator(z, y), y).float().mean()

    def latents(count):
        return torch.randn(count, latent), torch.randint(0, classes, (count,))

    def train(images, labels):
        with torch.device(images.device):
            for part in range(2):
                real = images[part::2]
                update(optimizer_d, discriminator_loss(real, labels[part::2], *latents(len(real))))
            discriminator.requires_grad_(False)
            loss = update(optimizer_g, generator_loss(*latents(len(images) // 2)))
            discriminator.requires_grad_(True)
            with torch.no_grad():
                torch._foreach_lerp_(list(averaged.parameters()), list(generator.parameters()), 1e-4)
        return loss

    return train, size_of(generator, discriminator)
