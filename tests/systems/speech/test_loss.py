"""Loss terms equal their definitions."""

import torch
from torch.nn.functional import cross_entropy

from stagesweep.systems.speech.loss import Balance, GateEntropy, GateTarget, TokenCrossEntropy


def outputs() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    logits = torch.randn(3, 2, 5, 7)
    labels = torch.randint(7, (3, 5))
    labels[0, 3:] = -100
    labels[2] = -100
    weights = torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.5, 0.5]])
    return {"logits": logits, "weights": weights}, {"labels": labels}


def test_a_clip_is_a_mean_over_its_tokens_weighted_by_experts() -> None:
    out, batch = outputs()
    total, weight = TokenCrossEntropy()(out, batch)
    expected = sum(
        out["weights"][b, k] * cross_entropy(out["logits"][b, k], batch["labels"][b])
        for b in (0, 1) for k in (0, 1)
    )  # fmt: skip
    torch.testing.assert_close(total, expected)
    assert weight == 2, "a clip without a transcript is ignored"


def test_all_tokens_may_have_equal_weight() -> None:
    out, batch = outputs()
    out["weights"] = torch.tensor([[1.0, 0.0]] * 3)
    total, weight = TokenCrossEntropy("token")(out, batch)
    expected = cross_entropy(out["logits"][:, 0].flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(total / weight, expected)
    assert weight == 8


def test_the_gate_learns_hard_or_soft_targets() -> None:
    scores = torch.randn(6, 3)
    out = {"gate": scores.log_softmax(1)}
    cluster, soft = torch.randint(3, (6,)), torch.rand(6, 3).softmax(1)
    batch = {"cluster": cluster, "soft": soft}
    total, weight = GateTarget("hard")(out, batch)
    torch.testing.assert_close(total / weight, cross_entropy(scores, cluster))
    total, weight = GateTarget("soft")(out, batch)
    torch.testing.assert_close(total / weight, cross_entropy(scores, soft))


def test_balance_is_minimal_for_uniform_usage() -> None:
    even = torch.eye(4).repeat(3, 1).clamp(1e-6, 1)
    one = torch.tensor([[1.0, 1e-6, 1e-6, 1e-6]]).repeat(12, 1)
    for kind, least, most in (("switch", 1.0, 4.0), ("kl", 0.0, None)):
        term = Balance(kind)  # type: ignore[arg-type]
        total, weight = term({"gate": even.log()}, {})
        assert weight == 12
        torch.testing.assert_close(total / weight, torch.tensor(least), atol=1e-4, rtol=0)
        total, weight = term({"gate": one.log()}, {})
        assert total / weight > least + 1
        if most is not None:
            torch.testing.assert_close(total / weight, torch.tensor(most), atol=1e-4, rtol=0)
    uneven = torch.tensor([[0.7, 0.2, 0.1]])
    total, _ = Balance("kl")({"gate": uneven.log()}, {})
    expected = torch.nn.functional.kl_div(uneven.log()[0], torch.full((3,), 1 / 3), reduction="sum")
    torch.testing.assert_close(total, expected)


def test_gate_entropy_is_negative_entropy() -> None:
    logs = torch.randn(5, 3).log_softmax(1)
    total, weight = GateEntropy()({"gate": logs}, {})
    expected = torch.distributions.Categorical(logits=logs).entropy().mean()
    torch.testing.assert_close(-total / weight, expected)
