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
counts of each gene and a small table replace them. Value and gradient come from one pass over
pieces that fit into the cache.
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
        total -= torch.dot(counts.sum(1), library.view(-1).log())
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
    """Value of some cells without the terms of `gammas`, library and theta alone; its gradient by
    scores, dropout and log theta if `wanted`.
    """
    log_share = scores.log_softmax(1)
    ratio = log_share.exp().mul_(library).mul_(1 / theta)
    log_ratio = ratio.log1p()
    flat = counts.reshape(-1)
    value = torch.dot(flat, log_ratio.view(-1)) - torch.dot(flat, log_share.view(-1))
    # No masks below: on a CPU they cost more than logarithms. `empty` is 1 where the count is 0,
    # and `rest` = 1 - A is sigmoid(pi - t) there.
    d_dropout = rest = None
    if dropout is None:
        value = value + torch.dot(log_ratio.sum(0), theta)
    else:
        above = torch.addcmul(dropout, log_ratio, theta)  # pi - t
        observed = counts.sign()
        empty = 1 - observed
        value = value + torch.dot(observed.view(-1), above.view(-1))
        rest, log_rest = _sigmoid(above)
        inflated, log_inflated = _sigmoid(dropout)
        value = value + torch.dot(empty.view(-1), log_rest.view(-1)) - log_inflated.sum()
        rest *= empty
        d_dropout = inflated.sub_(rest)
    if not wanted:
        return value, None
    shrink = (1 + ratio).reciprocal_()
    active = theta if rest is None else (1 - rest).mul_(theta)
    # Not as A theta (1 - 1 / (1 + r)): of a large theta nothing would be left but rounding.
    d_mean = torch.mul(active, ratio).sub_(counts).mul_(shrink)
    d_theta = (log_ratio * active).sum(0) - d_mean.sum(0)
    share = ratio.mul_(theta).mul_(1 / library)
    d_scores = d_mean.addcmul_(share, d_mean.sum(1, keepdim=True), value=-1)
    return value, (d_scores, d_dropout, d_theta)


def _sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    """The logistic function of x and its logarithm, which is x itself where that is below -80."""
    floored = x.clamp(min=-80)
    share = floored.sigmoid()
    return share, share.log().sub_(floored.sub_(x))


def gammas(theta: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of lnG(x + theta) - lnG(theta) - lnG(x + 1) over counts (B, g), and its derivative
    by log theta (g,).
    """
    values, genes = _observed(counts)
    codes = values.long().clamp_(max=TABLE)
    few = codes == values
    if not bool(few.all()):
        # In double precision: two large numbers are nearly the same.
        rest, other = ~few, theta[genes[~few]].double()
        x = values[rest].double()
        more = (torch.lgamma(x + other) - torch.lgamma(other) - torch.lgamma(x + 1)).sum().to(theta)
        slope = other * (torch.digamma(x + other) - torch.digamma(other))
        d_more = torch.zeros_like(theta).index_add_(0, genes[rest], slope.to(theta))
        codes, genes = codes[few], genes[few]
    size = (TABLE + 1) * len(theta)
    seen = torch.bincount(codes * len(theta) + genes, minlength=size).view(TABLE + 1, -1)
    # How many counts of each gene are above i: so often log(theta + i) is added.
    above = seen.flip(0).cumsum(0).flip(0)[1:].to(theta)
    steps = torch.arange(TABLE, device=theta.device, dtype=theta.dtype).unsqueeze(1)
    shifted = steps + theta
    total = torch.dot(above.view(-1), shifted.log().view(-1))
    total -= torch.dot(above.sum(1), (steps + 1).log().view(-1))
    slope = theta * (above / shifted).sum(0)
    return (total, slope) if bool(few.all()) else (total + more, slope + d_more)


def _observed(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The values that are not zero and the gene of each. On the CPU numpy finds them sooner."""
    if counts.is_cuda:
        rows, genes = counts.nonzero(as_tuple=True)
        return counts[rows, genes], genes
    flat = counts.reshape(-1).numpy()
    places = np.flatnonzero(flat > 0)
    remainders = places.astype(np.uint32) % np.uint32(counts.shape[1])
    return torch.from_numpy(flat[places]), torch.from_numpy(remainders.astype(np.int64))
