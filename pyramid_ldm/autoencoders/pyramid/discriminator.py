"""The PatchGAN discriminator: taming-transformers' `NLayerDiscriminator` without batch statistics."""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from pyramid_ldm.nn.layers import group_norm


class PatchDiscriminator(nn.Module):
    """Real-or-fake logits for overlapping patches: (B, 3, H, W) in [-1, 1] -> (B, 1, about H/8, about W/8).

    taming's BatchNorm is replaced by GroupNorm: it fails at batch 1 and makes images of a batch depend on each other.
    (Its ActNorm would initialise from the first batch, differently on every rank.)
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        from taming.modules.discriminator.model import NLayerDiscriminator, weights_init

        self.network = NLayerDiscriminator(input_nc=3, ndf=channels, n_layers=layers)
        self.network.apply(weights_init)  # N(0, 0.02) for every convolution
        for parent, name, norm in list(_batch_norms(self.network)):
            setattr(parent, name, group_norm(norm.num_features))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.network(image)
        return logits


def _batch_norms(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.BatchNorm2d]]:
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                yield parent, name, child


def hinge_loss(real: Tensor, fake: Tensor, judged: Tensor | None = None) -> Tensor:
    """The discriminator's loss: 0.5 * (mean relu(1 - real) + mean relu(1 + fake)); a scalar. Logits are (B, ...)."""
    return 0.5 * judged_mean(F.relu(1 - real.float()) + F.relu(1 + fake.float()), judged)


def judged_mean(values: Tensor, judged: Tensor | None) -> Tensor:
    """Mean of (B, ...) in which images that are not `judged` (B,) count as 0, so that micro-batches add up."""
    if judged is not None:
        values = values * judged.reshape(-1, *[1] * (values.dim() - 1))
    return values.mean()
