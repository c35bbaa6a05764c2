"""Views of whole batches: the plain centre view, and the paper's random augmentation.

n images of a batch, S stored side, R side of the network's input, all in pixels.
torchvision.transforms.v2 is the yardstick for every distribution; parameters are drawn
per image, only the order of the colour operations per batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sela_cli.images.batches import SMALL

# Makes a batch of the network's input from stored images.
ViewOf = Callable[[Tensor], Tensor]

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_GREY = (0.299, 0.587, 0.114)
_CROP_TRIES = 10


@dataclass(frozen=True)
class Augmentation:
    """RandomResizedCrop(scale), ColorJitter(jitter x 4), RandomGrayscale(grey), flip."""

    scale: tuple[float, float] | None = (0.2, 1.0)
    jitter: float = 0.4
    grey: float = 0.2
    flip: float = 0.5


AUGMENTATIONS = {
    # The reference leaves torchvision's scale for ImageNet; (.2, 1) is its CIFAR setting.
    "paper": Augmentation(),
    "imagenet": Augmentation(scale=(0.08, 1.0)),
    "crop": Augmentation(scale=(0.5, 1.0), jitter=0.0, grey=0.0, flip=0.0),
    "crop-flip": Augmentation(jitter=0.0, grey=0.0),
    "imagenet-crop-flip": Augmentation(scale=(0.08, 1.0), jitter=0.0, grey=0.0),
    "none": Augmentation(scale=None, jitter=0.0, grey=0.0, flip=0.0),
}


def centre_view(batch: Tensor, size: int) -> Tensor:
    """(n, 3, S, S) uint8 -> (n, 3, R, R) float, normalised: the whole of a small image,
    the middle 7/8 for a large network. No randomness."""
    side = batch.shape[-1]
    view = batch.float() / 255
    if size > SMALL:
        keep = round(side * 7 / 8)
        start = (side - keep) // 2
        view = view[:, :, start : start + keep, start : start + keep]
    return _normalised(_resized(view, size))


def ten_views(batch: Tensor, size: int) -> Tensor:
    """(n, 3, S, S) uint8 -> (10 n, 3, R, R) float, normalised: four corners and the centre of
    7/8 of the side, then their mirror images; the n images of one crop after another."""
    from torchvision.transforms.v2 import functional as transforms

    view = batch.float() / 255
    keep = round(batch.shape[-1] * 7 / 8)
    return _normalised(_resized(torch.cat(transforms.ten_crop(view, [keep, keep])), size))


def _resized(view: Tensor, size: int) -> Tensor:
    if view.shape[-1] == size:
        return view
    return functional.interpolate(
        view, (size, size), mode="bilinear", align_corners=False, antialias=True
    )


def random_view(
    batch: Tensor, size: int, augmentation: Augmentation, generator: torch.Generator
) -> Tensor:
    """(n, 3, S, S) uint8 -> (n, 3, R, R) float, normalised, a new random view of each.

    Every draw comes from `generator` (on the CPU), in the same order on every device.
    """
    if augmentation == AUGMENTATIONS["none"]:
        return centre_view(batch, size)
    view = _cropped(batch.float() / 255, size, augmentation, generator)
    if augmentation.jitter:
        view = _jittered(view, augmentation.jitter, generator)
    if augmentation.grey:
        grey = _uniform(len(view), 0, 1, generator, view) < augmentation.grey
        view = torch.where(grey[:, None, None, None], _luma(view), view)
    return _normalised(view)


def _normalised(view: Tensor) -> Tensor:
    mean = torch.tensor(MEAN, device=view.device)[:, None, None]
    std = torch.tensor(STD, device=view.device)[:, None, None]
    return (view - mean) / std


def _uniform(
    count: int, low: float, high: float, generator: torch.Generator, like: Tensor
) -> Tensor:
    return (torch.rand(count, generator=generator) * (high - low) + low).to(like.device)


def _crop_boxes(
    count: int, side: int, scale: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """(n, 4): top, left, height, width; the first of ten draws that fits, else the whole."""
    area = torch.rand(count, _CROP_TRIES, generator=generator) * (scale[1] - scale[0]) + scale[0]
    log_ratio = math.log(4 / 3)
    ratio = ((torch.rand(count, _CROP_TRIES, generator=generator) * 2 - 1) * log_ratio).exp()
    width = (side * (area * ratio).sqrt()).round()
    height = (side * (area / ratio).sqrt()).round()
    fits = (width >= 1) & (width <= side) & (height >= 1) & (height <= side)
    # The last column is the fallback that always fits.
    fits = torch.cat([fits, torch.ones(count, 1, dtype=torch.bool)], 1)
    whole = torch.full((count, 1), float(side))
    first = fits.float().argmax(1, keepdim=True)
    width = torch.cat([width, whole], 1).gather(1, first)[:, 0]
    height = torch.cat([height, whole], 1).gather(1, first)[:, 0]
    place = torch.rand(2, count, generator=generator)
    top = (place[0] * (side - height + 1)).floor()
    left = (place[1] * (side - width + 1)).floor()
    return torch.stack([top, left, height, width], 1)


def _cropped(
    view: Tensor, size: int, augmentation: Augmentation, generator: torch.Generator
) -> Tensor:
    """Crop, scale to R and flip in one resampling."""
    count, _, side, _ = view.shape
    scale = augmentation.scale or (1.0, 1.0)
    boxes = _crop_boxes(count, side, scale, generator).to(view.device)
    top, left, height, width = boxes.T
    flip = _uniform(count, 0, 1, generator, view) < augmentation.flip
    steps = (torch.arange(size, device=view.device) + 0.5) / size
    x = (left[:, None] + steps * width[:, None]) * (2 / side) - 1
    y = (top[:, None] + steps * height[:, None]) * (2 / side) - 1
    x = torch.where(flip[:, None], x.flip(1), x)
    grid = torch.stack(
        [x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1
    )
    return functional.grid_sample(view, grid, padding_mode="border", align_corners=False)


def _jittered(view: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    count = len(view)
    order = torch.randperm(4, generator=generator).tolist()
    factors = [
        _uniform(count, 1 - amount, 1 + amount, generator, view)[:, None, None, None]
        for _ in range(3)
    ]
    hue = _uniform(count, -amount, amount, generator, view)[:, None, None]
    for operation in order:
        if operation == 0:
            view = (view * factors[0]).clamp(0, 1)
        elif operation == 1:
            mean = _luma(view).mean((1, 2, 3), keepdim=True)
            view = (mean + (view - mean) * factors[1]).clamp(0, 1)
        elif operation == 2:
            grey = _luma(view)
            view = (grey + (view - grey) * factors[2]).clamp(0, 1)
        else:
            view = _hue_shifted(view, hue)
    return view


def _luma(view: Tensor) -> Tensor:
    weights = torch.tensor(_GREY, device=view.device)[:, None, None]
    return (view * weights).sum(1, keepdim=True)


def _hue_shifted(view: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` of a full turn, value and saturation kept (RGB -> HSV -> RGB)."""
    value, brightest = view.max(1)
    chroma = value - view.amin(1)
    safe = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    red, green, blue = view.unbind(1)
    sixth = torch.stack([(green - blue) / safe, (blue - red) / safe + 2, (red - green) / safe + 4])
    hue = sixth.gather(0, brightest[None])[0] / 6 + shift
    # Each channel of HSV is v - c * clamp(min(k, 4 - k), 0, 1), k = (n + 6 h) mod 6.
    offsets = torch.tensor([5.0, 3.0, 1.0], device=view.device)[:, None, None]
    k = (offsets + 6 * hue[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)
