"""Exact negative log-likelihood of counts, with or without zero inflation, and its gradient.

With mean mu = library x softmax(scores), inverse dispersion theta and zero inflation sigmoid(pi),
and t = theta (log theta - log(theta + mu)), the log-likelihood of a count x is (Risso et al. 2018,
eq. 1; in this form Lopez et al. 2018)

    x = 0:  softplus(t - pi) - softplus(-pi)
    x > 0:  t - pi - softplus(-pi) + x (log mu - log(theta + mu))
            + lnG(x + theta) - lnG(theta) - lnG(x + 1)

All of it is computed with r = mu / theta, so that nothing cancels: t = -theta log1p(r). With A = 1
where x > 0 and sigmoid(t - pi) elsewhere the gradient of the log-likelihood is

    d log mu     -A theta r / (1 + r) + x / (1 + r)
    d pi         -A + sigmoid(-pi)
    d log theta   A (t + theta r / (1 + r)) - x / (1 + r) + theta (psi(x + theta) - psi(theta))

The gamma functions are needed where counts are not zero, and there mostly of small whole counts,
for which lnG(x + theta) - lnG(theta) is the sum of log(theta + i) over i < x: a histogram of the
counts of each gene and a small table replace them up to where the table ends. Value and gradient
come from one pass over pieces that fit into the cache.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Whole counts up to here go through the table.
TABLE = 64
# Numbers of one piece of a matrix on the CPU: what is made of it stays in the cache.
PIECE = 1 << 16


def negative_log_likelihood(
    scores: Tensor, log_theta: Tensor, dropout: Tensor | None, counts: Tensor, library: Tensor
) -> Tensor:
    """The sum over cells and genes, a scalar, differentiable by the first three.

    `scores` (B, g) are the logits of each gene's share, `log_theta` (g,), `dropout` (B, g) the
    logits pi (None: negative binomial), `counts` (B, g) and `library` (B, 1), above 0.
    """
    total: Tensor = _Likelihood.apply(scores, log_theta, dropout, counts, library)  # type: ignore[no-untyped-call]
    return total


class _Likelihood(torch.autograd.Function):
    """The gradient is computed with the value, and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        log_theta: Tensor,
        dropout: Tensor | None,
        counts: Tensor,
        library: Tensor,
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        theta = log_theta.exp()
        gamma, d_gamma = gammas(theta, counts)
        total = torch.dot(counts.sum(0), log_theta) - gamma
        d_theta = -d_gamma
        d_scores = torch.empty_like(scores) if wanted else None
        d_dropout = torch.empty_like(scores) if wanted and dropout is not None else None
        rows = len(scores) if scores.is_cuda else max(1, PIECE // scores.shape[1])
        for start in range(0, len(scores), rows):
            part = slice(start, start + rows)
            pi = None if dropout is None else dropout[part]
            value, found = _piece(scores[part], theta, pi, counts[part], library[part], wanted)
            total += value
            if d_scores is not None:
                d_scores[part], d_pi, d_theta_part = found
                d_theta += d_theta_part
                if d_dropout is not None:
                    d_dropout[part] = d_pi
        ctx.save_for_backward(d_scores, d_theta, d_dropout)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if each is None else each * grad for each in ctx.saved_tensors)
        return (*scaled, None, None)


def _piece(
    scores: Tensor,
    theta: Tensor,
    dropout: Tensor | None,
    counts: Tensor,
    library: Tensor,
    wanted: bool,
) -> tuple[Tensor, Any]:
    """Value of some cells without the terms of `gammas` and of theta alone; its gradient by
    scores, dropout and log theta if `wanted`.
    """
    # Passes over memory are what this costs: most of them are in place, none makes a mask.
    shifted = scores - scores.amax(1, keepdim=True)
    observed = counts.view(-1)
    value = -torch.dot(observed, shifted.view(-1))
    mean = shifted.exp_()
    scale = library / mean.sum(1, keepdim=True)
    value -= torch.dot(counts.sum(1), scale.log().view(-1))
    mean *= scale
    ratio = mean * (1 / theta)
    log_ratio = ratio.log1p()
    value += torch.dot(observed, log_ratio.view(-1))
    active, d_dropout = theta, None
    if dropout is None:
        value += torch.dot(log_ratio.sum(0), theta)
    else:
        inflated, d_dropout, rest = _inflation(dropout, log_ratio, theta, counts)
        value += inflated
        active = torch.addcmul(theta, rest, theta, value=-1)
    if not wanted:
        return value, None
    # Not as A theta (1 - 1 / (1 + r)): of a large theta nothing would be left but rounding.
    d_mean = (active * ratio).sub_(counts).mul_((1 + ratio).reciprocal_())
    d_theta = log_ratio.mul_(active).sum(0) - d_mean.sum(0)
    d_scores = d_mean.addcmul_(mean, d_mean.sum(1, keepdim=True) / library, value=-1)
    return value, (d_scores, d_dropout, d_theta)


def _inflation(
    dropout: Tensor, log_ratio: Tensor, theta: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What zero inflation adds to the value, and t with it; its gradient by pi; and 1 - A.

    With s for sigmoid: -log s(pi) + log s(pi - t) where the count is 0, -log s(pi) + pi - t else.
    """
    pi = dropout.clamp(min=-80)  # less would be nothing in single precision
    above = torch.addcmul(pi, log_ratio, theta)  # pi - t
    some = counts.sign()
    value = torch.dot(some.view(-1), above.view(-1))
    inflated = pi.sigmoid_()
    rest = above.sigmoid_().mul_(1 - some)
    value -= (inflated / some.add_(rest)).log_().sum()
    return value, inflated.sub_(rest), rest


def gammas(theta: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of lnG(x + theta) - lnG(theta) - lnG(x + 1) over counts (B, g), and its derivative
    by log theta (g,).
    """
    values, genes = _observed(counts)
    codes = values.long().clamp_(max=TABLE)
    size = (TABLE + 1) * len(theta)
    seen = torch.bincount(codes * len(theta) + genes, minlength=size).view(TABLE + 1, -1)
    # How many counts of each gene are above i: so often log(theta + i) is added.
    above = seen.flip(0).cumsum(0).flip(0)[1:].to(theta)
    steps = torch.arange(TABLE, device=theta.device, dtype=theta.dtype).unsqueeze(1)
    shifted = steps + theta
    total = torch.dot(above.view(-1), shifted.log().view(-1))
    total -= torch.dot(above.sum(1), (steps + 1).log().view(-1))
    slope = theta * (above / shifted).sum(0)
    (others,) = (codes != values).nonzero(as_tuple=True)
    if len(others):
        # In double precision: large numbers that are nearly the same are subtracted.
        x, low, which = values[others].double(), codes[others].double(), genes[others]
        own = theta[which].double()
        rest = torch.lgamma(x + own) - torch.lgamma(low + own)
        total += (rest - torch.lgamma(x + 1) + torch.lgamma(low + 1)).sum().to(theta)
        steeper = own * (torch.digamma(x + own) - torch.digamma(low + own))
        slope.index_add_(0, which, steeper.to(theta))
    return total, slope


def _observed(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The values that are not zero and the gene of each."""
    flat = counts.reshape(-1)
    where = places(flat)
    return flat[where], where % counts.shape[1]


def places(flat: Tensor) -> Tensor:
    """Where a vector is not zero. On the CPU numpy finds that in half the time."""
    if flat.is_cuda:
        return flat.nonzero().view(-1)
    return torch.from_numpy(np.flatnonzero(flat.numpy() != 0))
