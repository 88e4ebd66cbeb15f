"""The autoencoder's objective (LDM, cited by PDM): L1 + LPIPS + KL or codebook + hinge PatchGAN.

Every term is a *mean* per pixel or latent value. `accumulate_gradients` takes each term's gradient at the
reconstruction first: LPIPS and the discriminator are freed before the autoencoder's own backward pass, and what each
term asks of the decoder's last layer is known without walking the graph twice.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyramid_ldm.autoencoders.pyramid.autoencoder import AutoencoderOutput
from pyramid_ldm.autoencoders.pyramid.discriminator import PatchDiscriminator, judged_mean
from pyramid_ldm.autoencoders.pyramid.perceptual import PerceptualLoss
from pyramid_ldm.config.autoencoder import GanConfig, LossConfig


@dataclass
class AdaptiveWeight:
    """LDM's lambda = ||grad of rec|| / (||grad of gan|| + 1e-4) at the decoder's last layer.

    A ratio of norms does not add up over micro-batches, so both gradients are summed over micro-batches and ranks and
    their ratio is used in the *next* optimizer step. Part of the checkpoint.
    """

    max_weight: float
    value: float = 0.0
    reconstruction: Tensor | None = field(default=None, repr=False)
    gan: Tensor | None = field(default=None, repr=False)

    def add(self, reconstruction: Tensor, gan: Tensor) -> None:
        """Adds one micro-batch's gradients of the last layer."""
        self.reconstruction = reconstruction if self.reconstruction is None else self.reconstruction + reconstruction
        self.gan = gan if self.gan is None else self.gan + gan

    def finish_step(self, average: Callable[[Tensor], Tensor]) -> None:
        """Turns the sums of this step, averaged over ranks by `average`, into the weight of the next."""
        if self.reconstruction is None or self.gan is None:
            return
        ratio = average(self.reconstruction).norm() / (average(self.gan).norm() + 1e-4)
        if torch.isfinite(ratio):
            self.value = float(ratio.clamp(max=self.max_weight))
        self.reconstruction = self.gan = None


def ramped(weight: float, start: int, ramp: int, images_seen: int) -> float:
    """0 before `start` images, then rising linearly over `ramp` images to `weight`."""
    if images_seen < start:
        return 0.0
    return weight * min(1.0, (images_seen - start + 1) / max(ramp, 1))


def gan_factor(config: GanConfig, images_seen: int) -> float:
    """Weight of the generator's GAN term, which acts when the discriminator has learned for `disc_warmup` images."""
    return ramped(config.weight, config.start + config.disc_warmup, config.ramp, images_seen)


def discriminator_learns(config: GanConfig, images_seen: int) -> bool:
    """Whether the discriminator is trained yet."""
    return config.weight > 0 and images_seen >= config.start


class AutoencoderLoss:
    """All terms with their weights.

    Args:
        perceptual: None for weight 0.
        discriminator: the network the generator's term looks through, unwrapped; None without a GAN.
    """

    def __init__(
        self, config: LossConfig, perceptual: PerceptualLoss | None, discriminator: PatchDiscriminator | None
    ) -> None:
        self.config, self.perceptual, self.discriminator = config, perceptual, discriminator
        self.adaptive = AdaptiveWeight(config.gan.max_weight)

    def reconstruction(self, image: Tensor, target: Tensor, images_seen: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(weighted L1 + LPIPS, each of them unweighted; LPIPS where it counts already)."""
        l1 = (image.float() - target).abs().mean()
        total, parts = self.config.l1 * l1, {"l1": l1.detach()}
        perceptual = self.config.perceptual
        weight = ramped(perceptual.weight, perceptual.start, perceptual.ramp, images_seen)
        if self.perceptual is not None and weight > 0:
            lpips = self.perceptual(image, target)
            total = total + weight * lpips
            parts["lpips"] = lpips.detach()
        return total, parts

    def accumulate_gradients(
        self,
        output: AutoencoderOutput,
        target: Tensor,
        last_weight: Tensor,
        images_seen: int,
        scale: float,
        judged: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Adds `scale` times the gradient of the objective to the autoencoder's parameters, and to no others.

        Args:
            output: of the autoencoder, with its graph.
            target: (B, 3, H, W), what was encoded, or what is asked for in its place.
            last_weight: the decoder's last layer, for the adaptive GAN weight.
            scale: 1 / micro-batches of the step.
            judged: (B,) which of them the discriminator judges; None for all.

        Returns:
            The unweighted terms, detached.
        """
        seen = output.reconstruction.detach().requires_grad_()
        total, terms = self.reconstruction(seen, target, images_seen)
        (gradient,) = torch.autograd.grad(total, seen)

        gan_config = self.config.gan
        if self.discriminator is not None and discriminator_learns(gan_config, images_seen):
            generator = -judged_mean(self.discriminator(seen).float(), judged)
            (gan_gradient,) = torch.autograd.grad(generator, seen)
            terms["generator"] = generator.detach()
            weight = gan_factor(gan_config, images_seen)
            if gan_config.mode == "adaptive":
                self.adaptive.add(
                    *(
                        torch.autograd.grad(output.reconstruction, last_weight, g * scale, retain_graph=True)[0]
                        for g in (gradient, gan_gradient)
                    )
                )
                weight *= self.adaptive.value
            terms["gan_weight"] = torch.as_tensor(weight)
            if weight > 0:
                gradient = gradient + weight * gan_gradient

        kl = output.posterior.kl()
        latent = self.config.kl * kl + self.config.codebook * output.codebook_loss
        terms |= {"kl": kl.detach(), "codebook": output.codebook_loss.detach(), "loss": (total + latent).detach()}
        tensors, gradients = [output.reconstruction], [gradient * scale]
        if latent.requires_grad:
            tensors.append(latent)
            gradients.append(torch.full_like(latent, scale))
        torch.autograd.backward(tensors, gradients)
        return terms
