from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stagesweep.base.spec import Features, Spec
from stagesweep.base.view import Batch
from stagesweep.systems.audiogram.model.vae import ClusteringVAE

CONF = Path(__file__).parents[4] / "conf" / "model"


@pytest.fixture
def model(audiogram: Spec) -> ClusteringVAE:
    torch.manual_seed(0)
    return ClusteringVAE(audiogram)


def with_positives(batch: Batch, spec: Spec) -> Batch:
    names = [*spec.features, "thresholds/mask", *spec.categories]
    return batch | {f"positive/{name}": batch[name] for name in names}


def noisy(model: ClusteringVAE, batch: Batch) -> Batch:
    return batch | model.sample_noise(len(batch["index"]), torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("vae_base", 15e3, 25e3),
        ("vae_large", 500e3, 1000e3),
        ("vae_memory", 165e3, 180e3),
    ],
)
def test_sizes_on_audiograms(audiogram: Spec, name: str, low: float, high: float) -> None:
    settings = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert settings.pop("_target_") == "stagesweep.systems.audiogram.model.vae.ClusteringVAE"
    model = ClusteringVAE(audiogram, **settings)
    assert low <= sum(p.numel() for p in model.parameters()) <= high


def test_outputs_have_the_shapes_and_ranges_of_the_spec(
    model: ClusteringVAE, audiogram: Spec, batch: Batch
) -> None:
    outputs = model(noisy(model, with_positives(batch, audiogram)))
    widths = {"mean": 10, "logvar": 10, "latent": 10, "assignment": 12}
    widths |= {"projection": 32, "positive/projection": 32, "positive/assignment": 12}
    widths |= {name: len(features.names) for name, features in audiogram.features.items()}
    widths |= audiogram.categories
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        name: (40, width) for name, width in widths.items()
    }
    assert ((outputs["thresholds"] > 0) & (outputs["thresholds"] < 100)).all()
    for name in ("projection", "positive/projection"):
        torch.testing.assert_close(outputs[name].norm(dim=1), torch.ones(40))


def test_first_reconstruction_is_near_the_mean(model: ClusteringVAE, batch: Batch) -> None:
    outputs = model(noisy(model, batch))
    for name in ("thresholds", "metadata"):
        off = (outputs[name] - batch[f"{name}/shift"]) / batch[f"{name}/scale"]
        assert off.abs().max() < 0.5


def test_no_positives_no_projection_and_no_noise_no_sample(
    model: ClusteringVAE, batch: Batch
) -> None:
    outputs = model(batch)
    assert "projection" not in outputs
    assert torch.equal(outputs["latent"], outputs["mean"])


def test_latent_is_the_reparameterised_sample(model: ClusteringVAE, batch: Batch) -> None:
    given = noisy(model, batch)
    outputs = model(given)
    expected = outputs["mean"] + (outputs["logvar"] / 2).exp() * given["noise"]
    torch.testing.assert_close(outputs["latent"], expected)


def test_equal_positives_have_equal_projections_and_both_sides_learn(
    model: ClusteringVAE, audiogram: Spec, batch: Batch
) -> None:
    given = with_positives(batch, audiogram)
    outputs = model(given)
    torch.testing.assert_close(outputs["projection"], outputs["positive/projection"])
    for name in ("projection", "positive/projection"):
        (gradient,) = torch.autograd.grad(
            outputs[name][:, 0].sum(), model.encoder.mean.weight, retain_graph=True
        )
        assert gradient.abs().sum() > 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.floats(-1e6, 1e6))
def test_hidden_values_change_nothing(seed: int, size: float) -> None:
    g = torch.Generator().manual_seed(seed)
    names = tuple("abcd")
    spec = Spec(
        {
            "ordered": Features(names, low=0.0, high=1.0, ordered=True),
            "plain": Features(names),
            "image": Features(names, grid=(2, 2)),
        }
    )
    model = ClusteringVAE(spec, clusters=3)
    batch: Batch = {"index": torch.arange(6)}
    for name in spec.features:
        batch[name] = torch.randn(6, 4, generator=g)
        batch[f"{name}/mask"] = torch.rand(6, 4, generator=g) > 0.5
    other = dict(batch)
    for name in spec.features:
        other[name] = torch.where(batch[f"{name}/mask"], batch[name], torch.tensor(size))
    first, second = model(batch), model(other)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert value.isfinite().all(), name


@pytest.mark.parametrize("name", ["thresholds", "metadata", "pca", "sex", "centre"])
def test_every_observed_column_matters(model: ClusteringVAE, batch: Batch, name: str) -> None:
    other = dict(batch)
    column = batch[name]
    other[name] = column + 1 if column.is_floating_point() else (column + 1) % 3
    assert not torch.allclose(model(batch)["mean"], model(other)["mean"])


def test_samples_do_not_see_each_other(model: ClusteringVAE, audiogram: Spec, batch: Batch) -> None:
    given = noisy(model, with_positives(batch, audiogram))
    whole = model(given)
    part = model({name: column[10:20] for name, column in given.items()})
    for name, value in part.items():
        torch.testing.assert_close(value, whole[name][10:20], rtol=1e-4, atol=1e-5)


def test_checkpointing_changes_no_gradient(
    model: ClusteringVAE, audiogram: Spec, batch: Batch
) -> None:
    given = noisy(model, with_positives(batch, audiogram))

    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        model.checkpointed = checkpointed
        model.zero_grad()
        outputs = model(given)
        sum(value.square().sum() for value in outputs.values()).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == len(list(model.parameters()))
    for a, b in zip(plain, checkpointed, strict=True):
        assert torch.equal(a, b)


def test_bfloat16_is_close(model: ClusteringVAE, audiogram: Spec, batch: Batch) -> None:
    given = with_positives(batch, audiogram)
    exact = model(given)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(given)
    for name in ("mean", "logvar", "thresholds", "assignment", "projection"):
        assert rough[name].dtype == torch.float32
        scale = exact[name].abs().max()
        assert (rough[name] - exact[name]).abs().max() < 0.05 * scale, name


def test_images_with_and_without_convolutions(images: Spec) -> None:
    batch = {"image": torch.rand(4, 30), "index": torch.arange(4)}
    for channels in ((), (4, 8)):
        outputs = ClusteringVAE(images, channels=channels, clusters=10)(batch)
        assert outputs["image"].shape == (4, 30)
        assert ((outputs["image"] > 0) & (outputs["image"] < 1)).all()


def test_categories_alone_are_enough() -> None:
    model = ClusteringVAE(Spec(features={}, categories={"sex": 3}))
    outputs = model({"sex": torch.tensor([0, 1, 2]), "index": torch.arange(3)})
    assert outputs["sex"].shape == (3, 3)


def test_noise_comes_from_the_generator_alone(model: ClusteringVAE) -> None:
    first, second = (model.sample_noise(5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first["noise"].shape == (5, 10)
    assert torch.equal(first["noise"], second["noise"])
