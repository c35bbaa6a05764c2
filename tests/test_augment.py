"""Views: torchvision is the yardstick for the operations and for their distributions."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, ks_2samp, kstest
from torch import Tensor
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional

from sela_cli.images import augment
from sela_cli.images.augment import (
    AUGMENTATIONS,
    MEAN,
    STD,
    Augmentation,
    centre_view,
    draw,
    drawn_view,
    random_view,
    ten_views,
)

MEAN_311 = torch.tensor(MEAN)[:, None, None]
STD_311 = torch.tensor(STD)[:, None, None]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int, side: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=seeded(seed))


def colours(view: Tensor) -> Tensor:
    """Undo the normalisation."""
    return view * STD_311 + MEAN_311


# ---- centre view ------------------------------------------------------------


@pytest.mark.parametrize(("side", "size"), [(256, 224), (112, 98), (32, 32)])
def test_centre_view_is_torchvisions(side: int, size: int) -> None:
    batch = noise(3, side)
    steps = v2.Compose(
        [v2.CenterCrop(size), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    )
    torch.testing.assert_close(centre_view(batch, size), steps(batch))


def test_centre_view_scales_small_images_for_large_networks() -> None:
    batch = noise(2, 32)
    expected = functional.resize(
        functional.center_crop(batch, [28, 28]).float() / 255, [224, 224], antialias=True
    )
    torch.testing.assert_close(colours(centre_view(batch, 224)), expected, atol=1e-5, rtol=0)


def test_ten_views_are_torchvisions() -> None:
    batch = noise(2, 128)
    crops = v2.TenCrop(112)(batch)
    steps = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    torch.testing.assert_close(ten_views(batch, 112), torch.cat([steps(crop) for crop in crops]))


def test_no_augmentation_is_the_centre_view() -> None:
    batch = noise(2, 32)
    view = random_view(batch, 32, AUGMENTATIONS["none"], seeded())
    assert torch.equal(view, centre_view(batch, 32))


# ---- all of a view ----------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "none"])
def test_view_is_a_function_of_the_generator(name: str) -> None:
    batch, augmentation = noise(6, 32), AUGMENTATIONS[name]
    first = random_view(batch, 32, augmentation, seeded(1))
    torch.manual_seed(99)
    assert torch.equal(random_view(batch, 32, augmentation, seeded(1)), first)
    assert not torch.equal(random_view(batch, 32, augmentation, seeded(2)), first)


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "none"])
def test_each_image_has_a_view_of_its_own(name: str) -> None:
    one, augmentation = noise(1, 32), AUGMENTATIONS[name]
    views = random_view(one.expand(8, -1, -1, -1), 32, augmentation, seeded())
    assert all(not torch.equal(views[i], views[j]) for i in range(8) for j in range(i))


def test_a_view_does_not_depend_on_the_other_images() -> None:
    batch = noise(6, 32)
    changed = batch.clone()
    changed[0] = 255 - changed[0]
    paper = AUGMENTATIONS["paper"]
    views, after = (random_view(images, 32, paper, seeded(3)) for images in (batch, changed))
    assert torch.equal(views[1:], after[1:]) and not torch.equal(views[0], after[0])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_views_made_in_tiles_are_those_of_the_batch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, augmentation = noise(7, 32), AUGMENTATIONS[name]
    whole = random_view(batch, 32, augmentation, seeded())
    monkeypatch.setattr(augment, "_TILE_PIXELS", 2 * 32**2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    torch.testing.assert_close(random_view(batch, 32, augmentation, seeded()), whole)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize(("side", "size"), [(32, 32), (80, 70)])
def test_views_stay_within_the_range_of_images(name: str, side: int, size: int) -> None:
    # Hard edges and pure colours are where an interpolation or a shift would overshoot.
    batch = (noise(32, side) > 127).to(torch.uint8) * 255
    view = random_view(batch, size, AUGMENTATIONS[name], seeded())
    assert view.shape == (32, 3, size, size)
    assert colours(view).min() >= -1e-5 and colours(view).max() <= 1 + 1e-5


# ---- colours ----------------------------------------------------------------


OPERATIONS = (
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
    functional.adjust_hue,
)


def jittered_by(factors: list[float], view: Tensor, generator: torch.Generator) -> Tensor:
    """The jitter of given brightness, contrast, saturation and hue, in a drawn order."""
    order = torch.randperm(4, generator=generator).tolist()
    count = len(view)
    factors_n3 = torch.tensor(factors[:3]).expand(count, 3)
    view = view.clone()
    augment._jitter(view, order, factors_n3, torch.full((count,), factors[3]))
    return view


def drawn_jitter(view: Tensor, augmentation: Augmentation = AUGMENTATIONS["paper"]) -> Tensor:
    draws = augment.draw(len(view), view.shape[-1], augmentation, seeded())
    assert draws.factors_n3 is not None and draws.hue_n is not None
    view = view.clone()
    augment._jitter(view, draws.order, draws.factors_n3, draws.hue_n)
    return view


@pytest.mark.parametrize("operation", range(4))
@pytest.mark.parametrize("share", [-0.4, -0.13, 0.27, 0.4])
def test_colour_operations_are_torchvisions(operation: int, share: float) -> None:
    view = noise(4, 16).float() / 255
    factors = [1.0, 1.0, 1.0, 0.0]
    factors[operation] += share
    expected = OPERATIONS[operation](view, factors[operation])
    assert (expected - view).abs().max() > 0.05
    # torchvision rounds the weights of grey to 0.2989, 0.587, 0.114.
    torch.testing.assert_close(jittered_by(factors, view, seeded()), expected, atol=1e-3, rtol=0)


def test_hue_of_greys_and_pure_colours() -> None:
    levels = torch.tensor([0.0, 0.5, 1.0])
    cube = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 27, 1)
    for shift in (-0.5, -0.2, 0.1, 1 / 3):
        got = cube.clone()
        augment._shift_hue(got, torch.full((1, 1, 1), shift))
        torch.testing.assert_close(got, functional.adjust_hue(cube, shift), atol=1e-5, rtol=0)


def test_colour_operations_come_in_a_random_order() -> None:
    view = noise(2, 8).float() / 255
    factors = [1.35, 0.65, 1.4, 0.3]
    expected = {}
    for order in permutations(range(4)):
        image = view
        for operation in order:
            image = OPERATIONS[operation](image, factors[operation])
        expected[order] = image
    found = set()
    for seed in range(40):
        got = jittered_by(factors, view, seeded(seed))
        distance = {order: float((got - image).abs().max()) for order, image in expected.items()}
        found.add(min(distance, key=lambda order: distance[order]))
        assert min(distance.values()) < 2e-3
    # Some orders give the same image; of 24 equally likely ones 40 draws see more than 8.
    assert len(found) > 8


def test_brightness_is_uniform_around_one() -> None:
    # The other three leave a constant grey image as it is.
    grey = torch.full((3000, 3, 2, 2), 0.5)
    factors = drawn_jitter(grey)[:, 0, 0, 0] / 0.5
    assert kstest(factors.numpy(), "uniform", (0.6, 0.8)).pvalue > 1e-4


def test_hue_shift_is_uniform_around_zero() -> None:
    # A pale red turns by the hue's shift; the other three keep its hue.
    red = torch.tensor([0.5, 0.25, 0.25])[:, None, None].expand(3000, 3, 2, 2)
    red_n, green_n, blue_n = drawn_jitter(red)[:, :, 0, 0].double().T
    angle = torch.atan2(3**0.5 * (green_n - blue_n), 2 * red_n - green_n - blue_n)
    # The angle is the hue at every sixth of a turn, and within 0.02 between them.
    assert angle.abs().max() <= 0.4 * 2 * torch.pi + 0.02
    within_a_sixth = int((angle.abs() <= torch.pi / 3).sum())
    assert binomtest(within_a_sixth, 3000, (1 / 6) / 0.4).pvalue > 1e-4
    assert binomtest(int((angle > 0).sum()), 3000, 0.5).pvalue > 1e-4


@pytest.mark.parametrize("probability", [0.2, 0.7])
def test_greys_come_with_their_probability(probability: float) -> None:
    batch = noise(1500, 4)
    augmentation = Augmentation(scale=None, jitter=0.0, hue=0.0, grey=probability, flip=0.0)
    view = colours(random_view(batch, 4, augmentation, seeded()))
    grey = (view.amax(1) - view.amin(1)).flatten(1).amax(1) < 1e-5
    assert binomtest(int(grey.sum()), 1500, probability).pvalue > 1e-4
    expected = functional.rgb_to_grayscale(batch.float() / 255, 3)
    torch.testing.assert_close(view[grey], expected[grey], atol=1e-3, rtol=0)
    torch.testing.assert_close(view[~grey], batch[~grey].float() / 255, atol=1e-5, rtol=0)


# ---- crops ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "side", "scale"),
    [(224, 256, (0.08, 1.0)), (224, 256, (0.2, 1.0)), (32, 32, (0.2, 1.0)), (448, 512, (0.5, 1.0))],
)
def test_crop_boxes_are_distributed_as_torchvisions(
    size: int, side: int, scale: tuple[float, float]
) -> None:
    """However small the images are kept, a network of 224 pixels has crops of 256."""
    count = 4000
    draws = augment.draw(count, size, Augmentation(scale), seeded())
    assert draws.boxes_n4 is not None
    ours = draws.boxes_n4.double().numpy() * side
    assert np.array_equal(ours, ours.round())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        image = torch.empty(3, side, side)
        theirs = np.array(
            [
                RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
                for _ in range(count)
            ],
            dtype=float,
        )
    for name, measure in {
        "area": lambda box: box[:, 2] * box[:, 3],
        "log ratio": lambda box: np.log(box[:, 3] / box[:, 2]),
        "top": lambda box: box[:, 0],
        "left": lambda box: box[:, 1],
    }.items():
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-4, name


@pytest.mark.parametrize("side", [1, 2, 32, 256])
def test_crop_boxes_lie_within_the_image(side: int) -> None:
    top, left, height, width = augment._crop_boxes(2000, side, (0.08, 1.0), seeded()).T
    assert (top >= 0).all() and (left >= 0).all()
    assert (height >= 1).all() and (width >= 1).all()
    assert (top + height <= side).all() and (left + width <= side).all()
    boxes = torch.stack([top, left, height, width])
    assert torch.equal(boxes, boxes.round())


def test_whole_area_falls_back_to_the_whole() -> None:
    """Only the ratio 1 fits into a square; where ten draws miss it, the whole is taken."""
    boxes = augment._crop_boxes(500, 256, (1.0, 1.0), seeded())
    assert torch.equal(boxes, torch.tensor([0.0, 0.0, 256.0, 256.0]).expand(500, -1))


def test_crops_are_torchvisions_within_their_edges() -> None:
    size, scale = 64, (0.3, 0.9)
    batch = noise(6, size)
    boxes = augment._crop_boxes(6, size, scale, seeded(5)).int().tolist()
    augmentation = Augmentation(scale=scale, jitter=0.0, hue=0.0, grey=0.0, flip=0.0)
    views = colours(random_view(batch, size, augmentation, seeded(5)))
    for view, image, box in zip(views, batch.float() / 255, boxes, strict=True):
        expected = functional.resized_crop(image, *box, size=[size, size], antialias=False)
        # At its edge a crop of ours is interpolated with the pixel beyond, theirs is not.
        edge = -(-size // (2 * min(box[2:])))
        inner = slice(edge, size - edge)
        torch.testing.assert_close(
            view[:, inner, inner], expected[:, inner, inner], atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_flips_are_mirrors_with_their_probability(probability: float) -> None:
    batch = noise(1000, 8)
    augmentation = Augmentation(scale=None, jitter=0.0, hue=0.0, grey=0.0, flip=probability)
    view = random_view(batch, 8, augmentation, seeded())
    plain = centre_view(batch, 8)
    distance = [(view - other).abs().amax((1, 2, 3)) for other in (plain, plain.flip(3))]
    assert (torch.minimum(*distance) < 1e-4).all()
    flipped = int((distance[1] < 1e-4).sum())
    assert binomtest(flipped, 1000, probability).pvalue > 1e-4


# ---- blur, and the whole of a set -------------------------------------------


@pytest.mark.parametrize(("side", "kernel"), [(32, 5), (224, 23)])
def test_blur_is_torchvisions(side: int, kernel: int) -> None:
    view = noise(3, side).float() / 255
    sigmas = [0.4, 0.0, 1.9]
    blurred = augment._blurred(view, torch.tensor(sigmas))
    assert torch.equal(blurred[1], view[1])
    for number in (0, 2):
        expected = functional.gaussian_blur(view[number], [kernel] * 2, [sigmas[number]] * 2)
        torch.testing.assert_close(blurred[number], expected, atol=1e-5, rtol=0)


def test_shares_of_jitter_and_blur() -> None:
    draws = augment.draw(4000, 32, AUGMENTATIONS["strong"], seeded())
    assert draws.jittered_n is not None and draws.sigma_n is not None and draws.hue_n is not None
    assert binomtest(int(draws.jittered_n.sum()), 4000, 0.8).pvalue > 1e-4
    blurred = draws.sigma_n > 0
    assert binomtest(int(blurred.sum()), 4000, 0.5).pvalue > 1e-4
    assert kstest(draws.sigma_n[blurred].numpy(), "uniform", (0.1, 1.9)).pvalue > 1e-4
    assert kstest(draws.hue_n.numpy(), "uniform", (-0.1, 0.2)).pvalue > 1e-4


def test_what_was_grey_before_the_jitter_stays_grey() -> None:
    """And no hue or saturation changes it."""
    batch, always = noise(50, 16), replace(AUGMENTATIONS["imagenet"], grey=1.0, scale=(0.999, 1.0))
    draws = draw(50, 16, always, seeded(3))
    assert draws.factors_n3 is not None and draws.hue_n is not None
    view = colours(drawn_view(batch, 16, draws))
    plain = draws.factors_n3.clone()
    plain[:, 2] = 1
    same = replace(draws, factors_n3=plain, hue_n=torch.zeros_like(draws.hue_n))
    assert torch.allclose(view, colours(drawn_view(batch, 16, same)), atol=1e-5)
    assert torch.allclose(view, view.mean(1, keepdim=True).expand_as(view), atol=1e-5)
    after = colours(drawn_view(batch, 16, replace(draws, grey_first=False)))
    assert not torch.allclose(view, after, atol=1e-2)


def torchvisions(name: str, size: int) -> v2.Compose:
    """The same set, put together from torchvision's parts, for one uint8 image."""
    if name == "strong":
        colours_ = [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(5, (0.1, 2.0))], p=0.5),
        ]
    else:
        colours_ = [v2.ColorJitter(0.4, 0.4, 0.4, 0.4), v2.RandomGrayscale(0.2)]
        if name == "imagenet":
            colours_.reverse()
    scale = (0.08, 1.0) if name == "imagenet" else (0.2, 1.0)
    crop = [v2.RandomResizedCrop(size, scale, antialias=size > 64)]
    if size > 64:
        crop.insert(0, v2.Resize(size * 8 // 7))
    to_float = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([to_float, *crop, *colours_, v2.RandomHorizontalFlip()])


def _hue(red: Tensor, green: Tensor, blue: Tensor) -> Tensor:
    return torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue)


@pytest.mark.parametrize(
    ("name", "side", "size"),
    [
        ("paper", 32, 32),
        ("imagenet", 32, 32),
        ("strong", 32, 32),
        ("paper", 32, 112),
        ("imagenet", 128, 112),
    ],
)
def test_views_are_distributed_as_torchvisions(name: str, side: int, size: int) -> None:
    """Statistics of 700 views of one image; for large networks with its Resize and antialias."""
    count, step = 700, size // 32
    ramp = torch.linspace(0, 1, side)
    smooth = torch.stack(
        [ramp.expand(side, side), ramp.expand(side, side).T, 1 - ramp[:, None] * ramp]
    )
    # Nothing as fine as a pixel of a large view: theirs is interpolated twice, ours once.
    rough = functional.resize(noise(1, side * 32 // size)[0] / 255, [side, side])
    image = ((smooth * 0.7 + 0.3 * rough) * 255).to(torch.uint8)
    ours = colours(
        random_view(image.expand(count, -1, -1, -1), size, AUGMENTATIONS[name], seeded(1))
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        transform = torchvisions(name, size)
        theirs = torch.stack([transform(image) for _ in range(count)])
    for measured, measure in {
        "brightness": lambda view: view.mean((1, 2, 3)),
        "contrast": lambda view: view.std((1, 2, 3)),
        "hue": lambda view: _hue(*view.mean((2, 3)).unbind(1)),
        "detail": lambda view: (
            (view[..., step:] - view[..., :-step]).abs().mean((1, 2, 3))
            / (view.std((1, 2, 3)) + 1e-3)
        ),
        "symmetry": lambda view: (view[..., : size // 2] - view[..., size // 2 :]).mean((1, 2, 3)),
    }.items():
        result = ks_2samp(measure(ours).numpy(), measure(theirs).numpy())
        assert result.pvalue > 1e-4, measured


def test_the_views_of_a_part_are_those_it_has_in_the_whole() -> None:
    batch, strong = noise(9, 32), AUGMENTATIONS["strong"]
    whole = random_view(batch, 32, strong, seeded(4))
    draws = augment.draw(9, 32, strong, seeded(4))
    for rows in (slice(0, 4), slice(4, 9)):
        part = augment.drawn_view(batch[rows], 32, draws.of(rows))
        torch.testing.assert_close(part, whole[rows], atol=1e-6, rtol=0)
