"""Exact negative log-likelihood of (zero-inflated) negative binomial counts, and its gradient.

With mean mu = library x softmax(scores), inverse dispersion theta and zero inflation sigmoid(pi),
and t = theta (log theta - log(theta + mu)), the log-likelihood of a count x is (Risso et al. 2018,
eq. 1; in this form Lopez et al. 2018)

    x = 0:  softplus(t - pi) - softplus(-pi)
    x > 0:  t - pi - softplus(-pi) + x (log mu - log(theta + mu))
            + lnG(x + theta) - lnG(theta) - lnG(x + 1)

With r = mu / theta nothing cancels: t = -theta log1p(r). With A = 1
where x > 0 and sigmoid(t - pi) elsewhere the gradient of the log-likelihood is

    d log mu     -A theta r / (1 + r) + x / (1 + r)
    d pi         -A + sigmoid(-pi)
    d log theta   A (t + theta r / (1 + r)) - x / (1 + r) + theta (psi(x + theta) - psi(theta))

Gamma functions are needed for non-zero counts only, most of which are small integers. For these,
lnG(x + theta) - lnG(theta) is the sum of log(theta + i) over i < x, so a histogram of the counts of
each gene and a small table replace the gamma functions. Value and gradient are computed in one pass
over chunks that fit into the cache.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Integer counts up to this value use the table.
TABLE_SIZE = 64
# Elements of a chunk on the CPU, chosen so that intermediate results stay in the cache.
CHUNK_SIZE = 1 << 16


def negative_binomial_nll(
    scores: Tensor, log_theta: Tensor, dropout: Tensor | None, counts: Tensor, library: Tensor
) -> Tensor:
    """Return the sum over cells and genes, a scalar that is differentiable by the first three.

    `scores` (B, g) are the logits of each gene's share of the library, `log_theta` (g,), `dropout`
    (B, g) the logits pi of zero inflation (None: negative binomial), `counts` (B, g), and `library`
    (B, 1) is above 0.
    """
    total: Tensor = _NegativeBinomialNLL.apply(scores, log_theta, dropout, counts, library)  # type: ignore[no-untyped-call]
    return total


class _NegativeBinomialNLL(torch.autograd.Function):
    """Computes the gradient in the forward pass, and scales it in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        log_theta: Tensor,
        dropout: Tensor | None,
        counts: Tensor,
        library: Tensor,
    ) -> Tensor:
        needs_grad = any(ctx.needs_input_grad)
        theta = log_theta.exp()
        gamma, d_gamma = log_gamma_terms(theta, counts)
        total = torch.dot(counts.sum(0), log_theta) - gamma
        d_theta = -d_gamma
        d_scores = torch.empty_like(scores) if needs_grad else None
        d_dropout = torch.empty_like(scores) if needs_grad and dropout is not None else None
        rows = len(scores) if scores.is_cuda else max(1, CHUNK_SIZE // scores.shape[1])
        for start in range(0, len(scores), rows):
            chunk = slice(start, start + rows)
            pi = None if dropout is None else dropout[chunk]
            value, gradients = _chunk_nll(
                scores[chunk], theta, pi, counts[chunk], library[chunk], needs_grad
            )
            total += value
            if d_scores is not None:
                d_scores[chunk], d_pi, d_theta_chunk = gradients
                d_theta += d_theta_chunk
                if d_dropout is not None:
                    d_dropout[chunk] = d_pi
        ctx.save_for_backward(d_scores, d_theta, d_dropout)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if each is None else each * grad for each in ctx.saved_tensors)
        return (*scaled, None, None)


def _chunk_nll(
    scores: Tensor,
    theta: Tensor,
    dropout: Tensor | None,
    counts: Tensor,
    library: Tensor,
    needs_grad: bool,
) -> tuple[Tensor, Any]:
    """Return the value of some cells, and its gradient by scores, dropout and log theta.

    The terms of `log_gamma_terms` and those of theta alone are left out.
    """
    # The cost is memory traffic: most operations are in place, and there are no masks.
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
        inflated, d_dropout, rest = _zero_inflation(dropout, log_ratio, theta, counts)
        value += inflated
        active = torch.addcmul(theta, rest, theta, value=-1)
    if not needs_grad:
        return value, None
    # Not as A theta (1 - 1 / (1 + r)), which cancels for large theta.
    d_mean = (active * ratio).sub_(counts).mul_((1 + ratio).reciprocal_())
    d_theta = log_ratio.mul_(active).sum(0) - d_mean.sum(0)
    d_scores = d_mean.addcmul_(mean, d_mean.sum(1, keepdim=True) / library, value=-1)
    return value, (d_scores, d_dropout, d_theta)


def _zero_inflation(
    dropout: Tensor, log_ratio: Tensor, theta: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the terms of zero inflation and t, the gradient by pi, and 1 - A.

    With s for sigmoid: -log s(pi) + log s(pi - t) where the count is 0, else -log s(pi) + pi - t.
    """
    pi = dropout.clamp(min=-80)  # smaller values underflow in single precision
    above = torch.addcmul(pi, log_ratio, theta)  # pi - t
    positive = counts.sign()
    value = torch.dot(positive.view(-1), above.view(-1))
    inflated = pi.sigmoid_()
    rest = above.sigmoid_().mul_(1 - positive)
    value -= (inflated / positive.add_(rest)).log_().sum()
    return value, inflated.sub_(rest), rest


def log_gamma_terms(theta: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of lnG(x + theta) - lnG(theta) - lnG(x + 1) over counts x (B, g), and its
    derivative by log theta (g,).
    """
    values, genes = _nonzero(counts)
    codes = values.long().clamp_(max=TABLE_SIZE)
    size = (TABLE_SIZE + 1) * len(theta)
    histogram = torch.bincount(codes * len(theta) + genes, minlength=size).view(TABLE_SIZE + 1, -1)
    # Number of counts of each gene above i, which is how often log(theta + i) occurs.
    above = histogram.flip(0).cumsum(0).flip(0)[1:].to(theta)
    steps = torch.arange(TABLE_SIZE, device=theta.device, dtype=theta.dtype).unsqueeze(1)
    shifted = steps + theta
    total = torch.dot(above.view(-1), shifted.log().view(-1))
    total -= torch.dot(above.sum(1), (steps + 1).log().view(-1))
    slope = theta * (above / shifted).sum(0)
    (beyond,) = (codes != values).nonzero(as_tuple=True)
    if len(beyond):
        # In double precision, because large numbers of nearly the same size are subtracted.
        x, low, gene = values[beyond].double(), codes[beyond].double(), genes[beyond]
        gene_theta = theta[gene].double()
        rest = torch.lgamma(x + gene_theta) - torch.lgamma(low + gene_theta)
        total += (rest - torch.lgamma(x + 1) + torch.lgamma(low + 1)).sum().to(theta)
        steeper = gene_theta * (torch.digamma(x + gene_theta) - torch.digamma(low + gene_theta))
        slope.index_add_(0, gene, steeper.to(theta))
    return total, slope


def _nonzero(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the non-zero values and the gene of each."""
    flat = counts.reshape(-1)
    index = nonzero_index(flat)
    return flat[index], index % counts.shape[1]


def nonzero_index(flat: Tensor) -> Tensor:
    """Return the indices of non-zero elements of a vector. On the CPU numpy is twice as fast."""
    if flat.is_cuda:
        return flat.nonzero().view(-1)
    return torch.from_numpy(np.flatnonzero(flat.numpy() != 0))
