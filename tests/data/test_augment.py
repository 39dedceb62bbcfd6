import pytest
import torch
from scipy.ndimage import affine_transform

from stagesweep.base.errors import UserError
from stagesweep.base.spec import Features, Spec
from stagesweep.base.view import Batch
from stagesweep.data.augment import AugmentImages, AugmentTable
from stagesweep.systems.audiogram.digits import Digits

IMAGES = Spec({"image": Features(tuple(map(str, range(63))), low=0.0, high=1.0, grid=(7, 9))})
STILL = {"shift": 0.0, "rotate": 0.0, "noise": 0.0}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images() -> Batch:
    """30 images of 7 x 9 pixels with an empty border."""
    image = torch.zeros(30, 7, 9)
    image[:, 2:5, 2:7] = torch.rand(30, 3, 5, generator=generator())
    return {"image": image.flatten(1), "index": torch.arange(30)}


@pytest.fixture
def digits() -> Batch:
    return {"image": Digits().split("train")["image"][:200]}


def test_without_settings_images_are_unchanged(images: Batch) -> None:
    positive = AugmentImages(**STILL)(images, IMAGES, generator())
    assert positive.keys() == {"positive/image"}
    torch.testing.assert_close(positive["positive/image"], images["image"])


def test_shift_moves_the_centre_of_mass_by_at_most_its_bound(images: Batch) -> None:
    positive = AugmentImages(**STILL | {"shift": 1.0})(images, IMAGES, generator())
    before = images["image"].view(-1, 7, 9)
    after = positive["positive/image"].view(-1, 7, 9)
    torch.testing.assert_close(after.sum((1, 2)), before.sum((1, 2)), rtol=1e-4, atol=1e-4)
    for axis, size in ((1, 7), (2, 9)):
        places = torch.arange(size, dtype=torch.float32)
        moved = [
            (image.sum(3 - axis) * places).sum(1) / image.sum((1, 2)) for image in (before, after)
        ]
        distance = (moved[1] - moved[0]).abs()
        assert distance.max() <= 1.0001
        assert distance.max() > 0.8
        assert distance.std() > 0.1


def test_rotation_is_that_of_scipy() -> None:
    spec = Spec({"image": Features(tuple(map(str, range(64))), low=0.0, high=1.0, grid=(8, 8))})
    image = Digits().split("train")["image"][:1]
    turn = AugmentImages(**STILL | {"rotate": 30.0})
    turned = turn({"image": image}, spec, generator())["positive/image"]
    # The angle is the first number drawn; see that the image turns about its middle by it.
    draw = 2 * torch.rand(7, 1, generator=generator()) - 1
    angle = torch.deg2rad(draw[0, 0] * 30)
    cosine, sine = angle.cos().item(), angle.sin().item()
    matrix = torch.tensor([[cosine, sine], [-sine, cosine]])
    middle = torch.full((2,), 3.5)
    expected = affine_transform(
        image.view(8, 8).numpy(),
        matrix.numpy(),
        offset=(middle - matrix @ middle).numpy(),
        order=1,
        mode="grid-constant",
    )
    torch.testing.assert_close(turned.view(8, 8), torch.tensor(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("setting", ["rotate", "shear", "stretch", "elastic", "stroke", "noise"])
def test_each_setting_changes_each_image_in_its_own_way(digits: Batch, setting: str) -> None:
    spec = Digits().spec
    amount = 15.0 if setting == "rotate" else 0.3
    augment = AugmentImages(**STILL | {setting: amount})
    change = augment(digits, spec, generator())["positive/image"] - digits["image"]
    assert (change.abs().amax(1) > 1e-4).float().mean() > 0.95
    assert change.abs().mean() < 0.25
    same = {"image": digits["image"][:1].expand(5, -1)}
    copies = augment(same, spec, generator())["positive/image"]
    assert len(copies.unique(dim=0)) == 5


def test_stroke_keeps_the_range_and_empty_pixels(digits: Batch) -> None:
    positive = AugmentImages(**STILL | {"stroke": 1.0})(digits, Digits().spec, generator())
    image = positive["positive/image"]
    assert 0 <= image.min() <= image.max() <= 1
    assert (image[digits["image"] == 0] < 1e-3).all()


def test_randomness_comes_from_the_generator_alone(images: Batch) -> None:
    augment = AugmentImages(shear=0.2, stretch=0.1, elastic=0.5, stroke=0.3)
    draws = [augment(images, IMAGES, generator(seed))["positive/image"] for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.allclose(draws[0], draws[2])


def test_data_without_images_are_refused() -> None:
    spec = Spec({"thresholds": Features(("6 kHz",))})
    with pytest.raises(UserError, match="has no images"):
        AugmentImages()({"thresholds": torch.zeros(2, 1)}, spec, generator())


@pytest.fixture
def table() -> tuple[Batch, Spec]:
    spec = Spec({"thresholds": Features(tuple("abcdef"), 0, 100, ordered=True)}, {"sex": 3})
    mask = torch.rand(2000, 6, generator=generator()) > 0.2
    value = torch.randn(2000, 6, generator=generator(1)).masked_fill(~mask, 0)
    sex = torch.randint(0, 3, (2000,), generator=generator())
    return {"thresholds": value, "thresholds/mask": mask, "sex": sex}, spec


def test_table_augmentation_has_the_stated_size(table: tuple[Batch, Spec]) -> None:
    batch, spec = table
    positive = AugmentTable(noise=0.05, dropout=0.1, scale=0.1)(batch, spec, generator())
    mask = positive["positive/thresholds/mask"]
    known = batch["thresholds/mask"]
    assert not (mask & ~known).any()
    assert 1 - mask[known].float().mean() == pytest.approx(0.1, abs=0.01)
    value, before = positive["positive/thresholds"], batch["thresholds"]
    assert (value[~mask] == 0).all()
    # var(x a + b) = scale^2 x^2 + noise^2
    expected = (0.1**2 * before[mask].square().mean() + 0.05**2).sqrt()
    assert (value - before)[mask].std() == pytest.approx(expected.item(), rel=0.05)
    assert torch.equal(positive["positive/sex"], batch["sex"])


def test_table_without_a_mask_gets_one(table: tuple[Batch, Spec]) -> None:
    batch, spec = table
    del batch["thresholds/mask"]
    positive = AugmentTable(noise=0, dropout=0.5, scale=0)(batch, spec, generator())
    mask = positive["positive/thresholds/mask"]
    assert mask.float().mean() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(positive["positive/thresholds"][mask], batch["thresholds"][mask])
