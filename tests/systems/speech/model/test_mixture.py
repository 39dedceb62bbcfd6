"""The mixture: routing, gradients, curriculum, decoding, and saved weights."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from stagesweep.base.errors import UserError
from stagesweep.config import schema
from stagesweep.core.optim import build_optimizer, freeze, frozen_modules, train_mode
from stagesweep.systems.speech.data.dataset import Speech
from stagesweep.systems.speech.loss import Balance, TokenCrossEntropy
from stagesweep.systems.speech.model.build import whisper, whisper_tiny
from stagesweep.systems.speech.model.mixture import MixtureWhisper, is_expert, layers

Batch = dict[str, torch.Tensor]
ADAPTERS = ["gate.*", "*.A.*", "*.B.*"]


@pytest.fixture
def batch(small: Speech) -> Batch:
    (found,) = small.split("train").batches(999)
    return {name: column[:12] for name, column in found.items()}


def gradients(model: MixtureWhisper, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total, weight = TokenCrossEntropy()(model(batch), batch)
    (total / weight).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("phase", ["soft", "topk", "hard"])
def test_gradients_of_the_routed_form_are_those_of_the_dense_one(
    tiny: MixtureWhisper, batch: Batch, phase: str
) -> None:
    tiny.double().train()
    batch = {n: c.double() if c.is_floating_point() else c for n, c in batch.items()}
    tiny.encode = lambda own: tiny.whisper.model.encoder(own["mel"]).last_hidden_state  # type: ignore[method-assign]
    freeze(tiny, ADAPTERS, [])
    tiny.phase = phase
    routed = gradients(tiny, batch)
    tiny.all_rows = True
    dense = gradients(tiny, batch)
    assert routed.keys() == dense.keys()
    assert any("gate" in name for name in routed)
    for name, value in routed.items():
        assert (value - dense[name]).abs().max() < 1e-6, name


def test_every_expert_and_the_gate_are_trained(tiny: MixtureWhisper, batch: Batch) -> None:
    """If adapters are switched before one backward pass, only the last one is trained."""
    freeze(tiny, ADAPTERS, [])
    train_mode(tiny, frozen_modules(tiny))
    tiny.phase = "soft"
    found = gradients(tiny, batch)
    assert found.keys() == {n for n, p in tiny.named_parameters() if p.requires_grad}
    assert len(found) == 4 + 2 * 4 * len(layers(tiny.whisper))
    assert all(value.abs().sum() > 0 for value in found.values())
    assert not tiny.whisper.model.encoder.training, "frozen modules are in evaluation mode"


def test_only_q_and_v_of_the_decoder_are_adapted(tiny: MixtureWhisper) -> None:
    names = [name for name, _ in layers(tiny.whisper)]
    assert names == [
        f"model.decoder.layers.0.{attention}.{which}"
        for attention in ("self_attn", "encoder_attn")
        for which in ("v_proj", "q_proj")
    ]


def test_each_clip_has_a_row_for_each_of_its_experts(tiny: MixtureWhisper, batch: Batch) -> None:
    freeze(tiny, ADAPTERS, [])
    tiny.train()
    counts = {}
    for phase in ("soft", "topk", "hard"):
        tiny.phase = phase
        out = tiny(batch)
        counts[phase] = out["logits"].shape[1]
        torch.testing.assert_close(out["weights"].sum(1), torch.ones(12))
        assert (out["experts"][:, 0] == out["gate"].argmax(1)).all()
    assert counts == {"soft": 4, "topk": 2, "hard": 2}
    torch.testing.assert_close(out["weights"], torch.tensor([[1.0, 0.0]]).expand(12, -1))
    tiny.eval()
    assert tiny(batch)["logits"].shape[1] == 1
    given = tiny({**batch, "expert": torch.arange(12) % 4})
    assert given["experts"][:, 0].tolist() == [n % 4 for n in range(12)]


def test_the_curriculum_and_the_temperature_follow_the_epochs(small: Speech) -> None:
    model = whisper_tiny(small.spec, width=16, heads=2, curriculum=(0.3, 0.7))
    seen = []
    for epoch in range(10):
        model.begin_epoch(epoch, 10)
        seen.append((model.phase, round(model.temperature, 3)))
    assert [phase for phase, _ in seen] == ["soft"] * 3 + ["topk"] * 4 + ["hard"] * 3
    assert (seen[0][1], seen[-1][1]) == (2.0, 1.0)
    assert all(a >= b for (_, a), (_, b) in pairwise(seen))


def test_an_inactive_expert_is_never_chosen(tiny: MixtureWhisper, batch: Batch) -> None:
    tiny.gate.active[1:3] = False
    tiny.train()
    for phase in ("soft", "topk"):
        tiny.phase = phase
        out = tiny(batch)
        chosen = out["experts"][out["weights"] > 0]
        assert set(chosen.tolist()) <= {0, 3}
        assert out["gate"].isfinite().all()
    total, weight = Balance()(tiny(batch), batch)
    assert (total / weight).isfinite()


def test_noise_is_drawn_for_the_whole_batch(small: Speech) -> None:
    model = whisper_tiny(small.spec, width=16, heads=2, noise=0.5)
    generator = torch.Generator().manual_seed(0)
    drawn = model.sample_noise(1000, generator)["gate_noise"]
    assert drawn.shape == (1000, 4)
    assert abs(drawn.std().item() - 0.5) < 0.03
    pooled = torch.randn(1000, 16)
    model.train()
    assert not torch.equal(model.probabilities(pooled, drawn), model.probabilities(pooled))
    model.eval()
    assert torch.equal(model.probabilities(pooled, drawn), model.probabilities(pooled))


@pytest.mark.parametrize("beams", [1, 3])
def test_the_most_probable_expert_decodes(tiny: MixtureWhisper, batch: Batch, beams: int) -> None:
    tiny.eval()
    tokens, experts, probabilities = tiny.transcribe(batch, beams)
    assert torch.equal(experts, probabilities.argmax(1))
    if beams > 1:
        return
    for row in range(4):  # step by step, always the most probable token
        own = {name: column[row : row + 1] for name, column in batch.items()}
        said = list(tiny.spec.tokens.prefix)
        for _ in range(5):
            own["tokens"] = torch.tensor([said])
            said.append(int(tiny(own)["logits"][0, 0, -1].argmax()))
            if said[-1] == tiny.spec.tokens.end:
                break
        expected = said[len(tiny.spec.tokens.prefix) :]
        assert tokens[row][: len(expected)].tolist() == expected


def test_mixtures_differ_and_are_restored(tiny: MixtureWhisper, batch: Batch) -> None:
    tiny.eval()
    found = {"routed": tiny(batch)["logits"]}
    for mixture in ("dense", "shared", "none"):
        with tiny.mixed(mixture):  # type: ignore[arg-type]
            found[mixture] = tiny(batch)["logits"]
    assert tiny.mixture == "routed"
    names = list(found)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            assert not torch.allclose(found[first], found[second]), (first, second)
    with torch.no_grad():
        for name, parameter in tiny.named_parameters():
            if ".B." in name:
                parameter.zero_()
    with tiny.mixed("none"):
        torch.testing.assert_close(tiny(batch)["logits"], found["none"])
    torch.testing.assert_close(tiny(batch)["logits"], found["none"])


def test_pooling_excludes_padding(tiny: MixtureWhisper) -> None:
    states = torch.randn(2, 18, 16)
    found = tiny.pool(states, torch.tensor([36, 7]))
    torch.testing.assert_close(found[0], states[0].mean(0))
    torch.testing.assert_close(found[1], states[1, :4].mean(0))


@pytest.fixture
def checkpoint(tmp_path: Path, small: Speech) -> Path:
    """A small Whisper with random weights, written by `save_pretrained`."""
    torch.manual_seed(1)
    base = whisper_tiny(small.spec, width=16, heads=2, encoder_layers=1, decoder_layers=1)
    own: Any = type(base.whisper)(base.whisper.config)
    own.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_checkpoint_is_loaded_trained_saved_and_loaded_again(
    checkpoint: Path, small: Speech, batch: Batch
) -> None:
    settings: dict[str, Any] = {"experts": 3, "rank": 2, "hidden": 8}
    model = whisper(small.spec, str(checkpoint), **settings)
    freeze(model, ADAPTERS, [])
    train_mode(model, frozen_modules(model))
    optimizer = build_optimizer(model, schema.Optimizer(lr=0.1))
    gradients(model, batch)
    optimizer.step()
    model.eval()
    logits = model(batch)["logits"]
    state = model.state_dict()
    assert all(is_expert(name) or name.startswith("gate.") for name in state)
    other = whisper(small.spec, str(checkpoint), **settings)
    other.eval()
    assert not torch.allclose(other(batch)["logits"], logits)
    other.load_state_dict(state)
    assert torch.equal(other(batch)["logits"], logits)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({n: v for n, v in state.items() if not n.startswith("gate")})


def test_base_weights_that_are_not_saved_cannot_be_trained(
    checkpoint: Path, small: Speech, batch: Batch
) -> None:
    model = whisper(small.spec, str(checkpoint), experts=2)
    model.train()
    with pytest.raises(
        UserError, match=r"are not saved, so they cannot be trained.*keep_base=true"
    ):
        model(batch)
    kept = whisper(small.spec, str(checkpoint), experts=2, keep_base=True)
    assert any("encoder" in name for name in kept.state_dict())
    kept.train()(batch)


def test_a_checkpoint_that_does_not_fit_is_an_error(
    checkpoint: Path, small: Speech, tmp_path: Path
) -> None:
    from dataclasses import replace

    tokens = small.spec.tokens
    for spec, message in (
        (replace(small.spec, tokens=replace(tokens, size=999)), "has 999 tokens, and model.path="),
        (replace(small.spec, tokens=replace(tokens, prefix=(7,))), "begins and ends transcripts"),
        (replace(small.spec, frames=50), "20 bands x 50 frames, and model.path="),
        (replace(small.spec, tokens=replace(tokens, longest=99)), "a transcript has 99 tokens"),
    ):
        with pytest.raises(UserError, match=message):
            whisper(spec, str(checkpoint))
    with pytest.raises(UserError, match=r"model.path=.*nothing is not a Whisper checkpoint"):
        whisper(small.spec, str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"model.k=9 must be between 1 and model.experts=4"):
        whisper_tiny(small.spec, k=9)
    with pytest.raises(UserError, match=r"model.curriculum=\[0.7, 0.3\] must be two fractions"):
        whisper_tiny(small.spec, curriculum=(0.7, 0.3))


def test_activation_checkpointing_has_the_same_gradients(
    tiny: MixtureWhisper, batch: Batch
) -> None:
    freeze(tiny, ADAPTERS, [])
    tiny.train()
    plain = gradients(tiny, batch)
    tiny.checkpointed = True
    again = gradients(tiny, batch)
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value)


def test_bf16_on_the_cpu(tiny: MixtureWhisper, batch: Batch) -> None:
    batch["expert"] = torch.arange(12) % 4  # the gate of a random model is undecided
    freeze(tiny, ADAPTERS, [])
    tiny.train()
    plain = gradients(tiny, batch)
    with torch.autocast("cpu", torch.bfloat16):
        out = tiny(batch)
    out = {n: v.float() if v.is_floating_point() else v for n, v in out.items()}
    total, weight = TokenCrossEntropy()(out, batch)
    tiny.zero_grad()
    (total / weight).backward()
    near = [
        torch.nn.functional.cosine_similarity(p.grad.flatten(), plain[n].flatten(), 0) > 0.9
        for n, p in tiny.named_parameters() if p.grad is not None
    ]  # fmt: skip
    assert sum(near) > 0.8 * len(near)
    tiny.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert len(tiny.transcribe(batch)[0]) == 12


@pytest.mark.gpu
def test_on_a_gpu(tiny: MixtureWhisper, batch: Batch) -> None:
    """Training never synchronises with the device."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    tiny.cuda().train()
    freeze(tiny, ADAPTERS, [])
    moved = {name: column.cuda() for name, column in batch.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = tiny(moved)
        total, weight = TokenCrossEntropy()(out, moved)
        (total / weight).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.autocast("cuda", torch.bfloat16):
        assert len(tiny.eval().transcribe(moved)[0]) == 12
