"""LoRA adapters of several experts in one linear layer (Hu et al. 2021, arXiv:2106.09685)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Route:
    """Routing of a forward pass, shared by all layers of a model.

    `rows` (N,): expert of each row. `weights` (N, E): weights of all experts in each row. Neither:
    the base model alone.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.weights: Tensor | None = None

    @contextmanager
    def active(self, rows: Tensor | None = None, weights: Tensor | None = None) -> Iterator[None]:
        """Use this routing within the block.

        It is not reset afterwards: with activation checkpointing, the backward pass repeats the
        forward pass after the block.
        """
        self.rows, self.weights = rows, weights
        yield


class ExpertLinear(nn.Module):
    """A linear layer with E adapters of rank r: W x + (alpha / r) B_e A_e x; the route gives e.

    Adapters are applied by batched products, without device synchronisation. `A` (r, in) is
    initialised as in peft, `B` (out, r) by zero, so a new adapter changes nothing.
    """

    def __init__(
        self,
        base: nn.Linear,
        route: Route,
        experts: int,
        rank: int,
        alpha: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.A = nn.ParameterList(
            nn.Parameter(torch.empty(rank, base.in_features)) for _ in range(experts)
        )
        self.B = nn.ParameterList(
            nn.Parameter(torch.zeros(base.out_features, rank)) for _ in range(experts)
        )
        for matrix in self.A:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        # Not an attribute of the module: the route is shared by all layers.
        self.__dict__["route"] = route

    route: Route

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, in) to (N, T, out)."""
        found: Tensor = self.base(x)
        rows, weights = self.route.rows, self.route.weights
        if rows is None and weights is None:
            return found
        A, B = torch.stack(tuple(self.A)), torch.stack(tuple(self.B))
        x = self.dropout(x)
        if rows is not None:
            reduced = torch.bmm(x, A[rows].transpose(1, 2))
            return found + self.scale * torch.bmm(reduced, B[rows].transpose(1, 2))
        assert weights is not None
        reduced = torch.einsum("nti,eri->nter", x, A) * weights[:, None, :, None].to(x.dtype)
        return found + self.scale * torch.einsum("nter,eor->nto", reduced, B)
