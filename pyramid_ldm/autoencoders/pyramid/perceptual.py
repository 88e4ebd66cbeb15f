"""LPIPS with VGG-16 (Zhang et al. 2018), from the lpips package, with a choice of where VGG's weights come from."""

import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pyramid_ldm.errors import UserError


class PerceptualLoss:
    """Mean LPIPS distance of two batches of images in [-1, 1].

    Not a Module: as a child of one, `train()` would wake its dropout, and its parameters would be counted, saved and
    trained. Its weights never need gradients; the images do.
    """

    def __init__(self, weights: str, device: torch.device) -> None:
        self.network = _build(weights).to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def __call__(self, image: Tensor, target: Tensor) -> Tensor:
        """Scalar; differentiable in `image`."""
        distance: Tensor = self.network(image, target)
        return distance.float().mean()

    @torch.no_grad()
    def in_parts(self, image: Tensor, target: Tensor, side: int = 512) -> float:
        """The mean over parts of up to side x side pixels, weighted by their areas: the memory of one part. Differs
        from the whole only by what VGG sees across their borders."""
        total = 0.0
        for rows in zip(image.split(side, dim=2), target.split(side, dim=2), strict=True):
            for a, b in zip(*(row.split(side, dim=3) for row in rows), strict=True):
                total += float(self(a, b)) * a.shape[2] * a.shape[3]
        return total / (image.shape[2] * image.shape[3])


def _build(weights: str) -> Any:
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision by its older argument names
        if weights == "imagenet":
            try:
                return lpips.LPIPS(net="vgg", verbose=False)
            except (OSError, RuntimeError, EOFError) as error:  # urllib's errors are OSErrors
                raise UserError(
                    f"loss.perceptual.weights=imagenet: torchvision could not load VGG-16 ({error}); give the path of "
                    f"a file with its weights (features.N.weight, features.N.bias), or loss.perceptual.weight=0"
                ) from None
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    if weights == "random":
        print(
            "loss.perceptual.weights=random: LPIPS looks through an untrained VGG-16. This is for tests and timings; "
            "train with imagenet, or with a file of VGG-16's weights.",
            file=sys.stderr,
        )
        return network
    _load_vgg(network, Path(weights))
    return network


def _load_vgg(network: Any, path: Path) -> None:
    """Copies features.N.* of torchvision's VGG-16 into the slices that lpips cuts it into."""
    if not path.is_file():
        raise UserError(
            f"VGG-16 weights {path}: no such file; give a path, imagenet or random (loss.perceptual.weights, --lpips)"
        )
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"VGG-16 weights {path}: cannot be read ({str(error).splitlines()[0]})") from None
    own = dict(network.net.named_parameters())  # sliceK.N.weight, N as in torchvision's features
    for name, parameter in own.items():
        key = "features." + name.split(".", 1)[1]
        if key not in state or state[key].shape != parameter.shape:
            raise UserError(f"VGG-16 weights {path}: {key} is missing or misshapen; expected VGG-16")
        parameter.data.copy_(state[key])
