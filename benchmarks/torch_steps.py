"""Train steps in PyTorch, the reference of `accelerator.py`: each function returns (step: images, labels -> loss, parameters)."""

from __future__ import annotations


def size_of(*modules) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def amp(torch):
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)


def update(torch, optimizer, loss):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def simclr(torch, pixels, encoders, nt_xent):
    nn = torch.nn
    head = [nn.Linear(2048, 2048, bias=False), nn.BatchNorm1d(2048), nn.ReLU(), nn.Linear(2048, 128, bias=False)]
    model = nn.Sequential(encoders["resnet50"](), *head, nn.BatchNorm1d(128)).to(memory_format=torch.channels_last)
    model[-1].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)

    @torch.compile
    def loss(images):
        x = (images.flatten(0, 1).float() / 255).contiguous(memory_format=torch.channels_last)
        with amp(torch):
            z = model(x)
        return nt_xent(z.float().unflatten(0, (-1, 2)))

    return lambda images, labels: update(torch, optimizer, loss(images)), size_of(model) - 128


def vit(torch, pixels, encoders, nt_xent):
    import timm

    model = timm.create_model("vit_base_patch16_224", num_classes=1000, img_size=pixels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    @torch.compile
    def loss(images, labels):
        with amp(torch):
            logits = model(images.float() / 127.5 - 1)
        return torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=0.1)

    return lambda images, labels: update(torch, optimizer, loss(images, labels)), size_of(model)


def vit_vqgan(torch, pixels, encoders, nt_xent):
    import torch_gans
    from torch_vit_vqgan import Tokenizer

    torch_gans.TAPS = torch_gans.TAPS.to(torch.get_default_device())
    softplus = torch.nn.functional.softplus
    tokenizer = Tokenizer(pixels)
    discriminator = torch_gans.StyleGAN2Discriminator(pixels, 16_384, 512, group=1).to(memory_format=torch.channels_last)
    options = dict(lr=1e-4, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    optimizers = [torch.optim.AdamW(module.parameters(), **options) for module in (tokenizer, discriminator)]

    def score(x):
        return discriminator((2 * x - 1).contiguous(memory_format=torch.channels_last))

    @torch.compile
    def tokenizer_loss(images):
        with amp(torch):
            picture, loss = tokenizer(images.float() / 255)
            return loss + 0.1 * softplus(-score(picture).float()).mean()

    @torch.compile
    def reconstruct(images):
        with amp(torch), torch.no_grad():
            return tokenizer(images.float() / 255)[0]

    @torch.compile
    def discriminator_loss(images, picture):
        with amp(torch):
            real, fake = score(images.float() / 255).float(), score(picture).float()
        return softplus(-real).mean() + softplus(fake).mean()

    def train(images, labels):
        discriminator.requires_grad_(False)
        loss = update(torch, optimizers[0], tokenizer_loss(images))
        discriminator.requires_grad_(True)
        update(torch, optimizers[1], discriminator_loss(images, reconstruct(images)))
        return loss

    return train, size_of(tokenizer, discriminator)
