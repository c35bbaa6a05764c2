"""Views of whole batches: the plain centre view, and the paper's random augmentation.

n images of a batch, S stored side, R side of the network's input, all in pixels.
torchvision.transforms.v2 is the yardstick for every distribution; parameters are drawn
per image, only the order of the colour operations per batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sela_cli.devices import sent
from sela_cli.images.batches import SMALL, resized_side

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_GREY = (0.299, 0.587, 0.114)
_CROP_TRIES = 10
# Pixels of a view that are made together by a thread: what each operation writes, the next
# finds in the cache. At 224 pixels that is twice as fast as a whole batch, bit for bit the same.
_TILE_PIXELS = 1 << 17
# In place of a chroma of 0.
_LEAST = 1e-20
# Range of the blur's standard deviation, in pixels.
_SIGMA = (0.1, 2.0)


@dataclass(frozen=True)
class Augmentation:
    """Random crop, colour jitter, grey, blur and flip; shares are of the images.

    RandomResizedCrop(scale); ColorJitter(jitter, jitter, jitter, hue) of a share
    `jitter_share`; RandomGrayscale(grey); GaussianBlur(sigma 0.1..2) of a share `blur`;
    RandomHorizontalFlip(flip). `grey_first`: before the jitter.
    """

    scale: tuple[float, float] | None = (0.2, 1.0)
    jitter: float = 0.4
    hue: float = 0.4
    jitter_share: float = 1.0
    grey: float = 0.2
    blur: float = 0.0
    flip: float = 0.5
    grey_first: bool = False


AUGMENTATIONS = {
    # The reference leaves torchvision's scale for ImageNet, and makes grey first there.
    "paper": Augmentation(),
    "imagenet": Augmentation(scale=(0.08, 1.0), grey_first=True),
    # MoCo v2 (Chen et al. 2020), which took jitter and blur from SimCLR.
    "strong": Augmentation(hue=0.1, jitter_share=0.8, blur=0.5),
    "crop": Augmentation(scale=(0.5, 1.0), jitter=0.0, hue=0.0, grey=0.0, flip=0.0),
    "crop-flip": Augmentation(jitter=0.0, hue=0.0, grey=0.0),
    "imagenet-crop-flip": Augmentation(scale=(0.08, 1.0), jitter=0.0, hue=0.0, grey=0.0),
    "none": Augmentation(scale=None, jitter=0.0, hue=0.0, grey=0.0, flip=0.0),
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
    return _normalise(_resized(view, size))


def ten_views(batch: Tensor, size: int) -> Tensor:
    """(n, 3, S, S) uint8 -> (10 n, 3, R, R) float, normalised: four corners and the centre of
    7/8 of the side, then their mirror images; the n images of one crop after another."""
    from torchvision.transforms.v2 import functional as transforms

    view = batch.float() / 255
    keep = round(batch.shape[-1] * 7 / 8)
    return _normalise(_resized(torch.cat(transforms.ten_crop(view, [keep, keep])), size))


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
    return drawn_view(batch, size, draw(len(batch), size, augmentation, generator))


@dataclass(frozen=True)
class Draws:
    """All that is random about the views of n images; None: that operation is left out.

    Boxes are top, left, height and width, as shares of the image's side.
    """

    boxes_n4: Tensor | None = None
    flip_n: Tensor | None = None
    order: tuple[int, ...] = ()
    factors_n3: Tensor | None = None
    hue_n: Tensor | None = None
    jittered_n: Tensor | None = None
    grey_n: Tensor | None = None
    grey_first: bool = False
    sigma_n: Tensor | None = None

    def of(self, rows: slice) -> Draws:
        """Those of some of the images."""
        return self._changed(lambda values_n: values_n[rows])

    def on(self, device: str) -> Draws:
        """The same on a device, but for what decides there which images are worked on."""
        return replace(self._changed(lambda values_n: sent(values_n, device)), sigma_n=self.sigma_n)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Draws:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {n: change(v) for n, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **changed)


# Draws the views of the next so many images, for networks of so many pixels.
DrawOf = Callable[[int, int], Draws]


def draw(count: int, size: int, augmentation: Augmentation, generator: torch.Generator) -> Draws:
    """Draw `count` views for a network of `size` pixels. A sigma of 0 is no blur."""
    if augmentation == AUGMENTATIONS["none"]:
        return Draws()
    # Resize(256) comes before RandomResizedCrop(224), of images that are kept smaller too.
    side = resized_side(size)
    boxes_n4 = _crop_boxes(count, side, augmentation.scale or (1.0, 1.0), generator) / side
    flip_n = _uniform(count, 0, 1, generator) < augmentation.flip
    draws = Draws(boxes_n4, flip_n)
    if augmentation.jitter:
        amount, hue = augmentation.jitter, augmentation.hue
        draws = replace(
            draws,
            order=tuple(torch.randperm(4, generator=generator).tolist()),
            factors_n3=torch.stack(
                [_uniform(count, 1 - amount, 1 + amount, generator) for _ in range(3)], dim=1
            ),
            hue_n=_uniform(count, -hue, hue, generator),
        )
        if augmentation.jitter_share < 1:
            jittered_n = _uniform(count, 0, 1, generator) < augmentation.jitter_share
            draws = replace(draws, jittered_n=jittered_n)
    if augmentation.grey:
        grey_n = _uniform(count, 0, 1, generator) < augmentation.grey
        draws = replace(draws, grey_n=grey_n, grey_first=augmentation.grey_first)
    if augmentation.blur:
        blurred_n = _uniform(count, 0, 1, generator) < augmentation.blur
        draws = replace(draws, sigma_n=_uniform(count, *_SIGMA, generator) * blurred_n)
    return draws


def drawn_view(batch: Tensor, size: int, draws: Draws) -> Tensor:
    """`random_view` with draws made before."""
    if draws.boxes_n4 is None:
        return centre_view(batch, size)
    if batch.device.type != "cpu":
        return _drawn(batch, size, draws)
    images = max(1, _TILE_PIXELS // size**2) * torch.get_num_threads()
    view = torch.empty(len(batch), 3, size, size)
    for start in range(0, len(batch), images):
        rows = slice(start, start + images)
        view[rows] = _drawn(batch[rows], size, draws.of(rows))
    return view


def _drawn(batch: Tensor, size: int, draws: Draws) -> Tensor:
    assert draws.boxes_n4 is not None and draws.flip_n is not None
    view = _cropped(batch.float().div_(255), size, draws.boxes_n4, draws.flip_n)
    if draws.grey_first:
        _make_grey(view, draws)
    if draws.factors_n3 is not None and draws.hue_n is not None:
        before = view if draws.jittered_n is None else view.clone()
        _jitter(view, draws.order, draws.factors_n3, draws.hue_n)
        if draws.jittered_n is not None:
            view = before.lerp_(view, _to_images(draws.jittered_n, view))
    if not draws.grey_first:
        _make_grey(view, draws)
    if draws.sigma_n is not None:
        view = _blurred(view, draws.sigma_n)
    return _normalise(view)


# A verb works in place: memory that is new costs as much as the arithmetic.
def _make_grey(view: Tensor, draws: Draws) -> None:
    if draws.grey_n is not None:
        view.lerp_(_luma(view), _to_images(draws.grey_n, view))


def _to_images(values_n: Tensor, view: Tensor) -> Tensor:
    return values_n.to(view.device, view.dtype)[:, None, None, None]


def _normalise(view: Tensor) -> Tensor:
    return view.sub_(_of_channels(MEAN, view.device)).div_(_of_channels(STD, view.device))


@cache
def _of_channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(3, 1, 1). Kept, since a copy to a GPU waits for what it is at."""
    return torch.tensor(values, device=device)[:, None, None]


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) * (high - low) + low


def _crop_boxes(
    count: int, side: int, scale: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """(n, 4), whole pixels: the first of ten draws that fits, else all of the image."""
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


def _cropped(view: Tensor, size: int, boxes_n4: Tensor, flip_n: Tensor) -> Tensor:
    """Crop, scale to R and flip in one resampling."""
    top, left, height, width = 2 * boxes_n4.to(view.device).T
    steps = (torch.arange(size, device=view.device) + 0.5) / size
    x = left[:, None] + steps * width[:, None] - 1
    y = top[:, None] + steps * height[:, None] - 1
    x = torch.where(flip_n.to(view.device)[:, None], x.flip(1), x)
    grid = torch.stack(
        [x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1
    )
    return functional.grid_sample(view, grid, padding_mode="border", align_corners=False)


def _jitter(view: Tensor, order: Sequence[int], factors_n3: Tensor, hue_n: Tensor) -> None:
    factors = [_to_images(factors_n, view) for factors_n in factors_n3.T]
    for operation in order:
        if operation == 0:
            view.mul_(factors[0]).clamp_(0, 1)
        elif operation == 1:
            mean = _luma(view).mean((1, 2, 3), keepdim=True)
            view.sub_(mean).mul_(factors[1]).add_(mean).clamp_(0, 1)
        elif operation == 2:
            grey = _luma(view)
            view.sub_(grey).mul_(factors[2]).add_(grey).clamp_(0, 1)
        else:
            _shift_hue(view, hue_n.to(view.device)[:, None, None])


def _blurred(view: Tensor, sigma_n: Tensor) -> Tensor:
    """Gaussian blur of the images whose sigma is not 0, along one axis and then the other.

    The kernel is SimCLR's: an odd number of pixels, about a tenth of the side.
    """
    chosen = sigma_n.nonzero()[:, 0]
    if not len(chosen):
        return view
    reach = max(1, round(view.shape[-1] / 20))
    offsets = torch.arange(-reach, reach + 1)
    weights_nr = (-0.5 * (offsets / sigma_n[chosen, None]) ** 2).exp()
    weights_nr = sent(weights_nr / weights_nr.sum(1, keepdim=True), view.device)
    chosen = sent(chosen, view.device)
    sharp = view[chosen]
    # Each channel of each image is a group of its own, with its image's kernel.
    groups = sharp.shape[0] * sharp.shape[1]
    kernels = weights_nr.repeat_interleave(sharp.shape[1], 0)[:, None]
    planes = functional.pad(sharp, [reach] * 4, mode="reflect").flatten(0, 1)[None]
    planes = functional.conv2d(planes, kernels[:, :, None, :], groups=groups)
    planes = functional.conv2d(planes, kernels[:, :, :, None], groups=groups)
    return view.index_copy(0, chosen, planes.view_as(sharp))


def _luma(view: Tensor) -> Tensor:
    red, green, blue = view.unbind(1)
    luma = (red * _GREY[0]).add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2])
    return luma[:, None]


def _shift_hue(view: Tensor, shift: Tensor) -> None:
    """Turn the hue by `shift` of a full turn, value and saturation kept (RGB -> HSV -> RGB)."""
    value = view.amax(1)
    chroma = value - view.amin(1)
    # Of a grey it divides zeros.
    safe = chroma.clamp_min(_LEAST)
    red, green, blue = view.unbind(1)
    # The hue in sixths of a turn, counted from the brightest channel: by the last that is.
    # Masks are numbers: with Booleans an operation takes ten times as long.
    sixth, mask, part = torch.zeros_like(value), torch.empty_like(value), torch.empty_like(value)
    for channel, before, after, hue in (
        (blue, green, red, 4),
        (green, red, blue, 2),
        (red, blue, green, 0),
    ):
        torch.eq(channel, value, out=mask)
        torch.sub(after, before, out=part).div_(safe).add_(hue)
        sixth.lerp_(part, mask)
    sixth.div_(6).add_(shift)
    sixth.sub_(torch.floor(sixth, out=part)).mul_(6)
    # A channel lacks of the value 0 to 1 times the chroma, by its distance from its own hue.
    torch.sub(sixth, 3, out=part).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma)
    torch.sub(value, part, out=red)
    for channel, hue in ((green, 2), (blue, 4)):
        torch.sub(sixth, hue, out=part).abs_().sub_(1).clamp_(0, 1).mul_(chroma)
        torch.sub(value, part, out=channel)
