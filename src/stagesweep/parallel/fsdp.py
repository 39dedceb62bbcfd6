"""A model whose weights, gradients and moments are divided among the processes of a fit.

torch's FSDP2 does that: each process holds a part of every parameter, and has the whole of a unit
of the model while that computes. Imported by fits that ask for it alone.
"""

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from stagesweep.base.errors import UserError
from stagesweep.base.files import explained
from stagesweep.core import checkpoint
from stagesweep.parallel.process_group import Team

# A module of so many parameters is a unit: it is collected before it computes, and let go after.
UNIT = 1_000_000

# Where a tensor is in the state of a fit: ("model", "encoder.weight").
Place = tuple[str | int, ...]


class Shards:
    """Whatever computes with divided models, all of which are used alike on every process.

    A unit must be called as a module, by all processes in the same order; what is smaller belongs
    to the model as a whole, of which each process may use another part.
    """

    def __init__(self, team: Team, device: torch.device) -> None:
        self.team = team
        self.mesh = init_device_mesh(device.type, (team.size,))
        self.units: list[FSDPModule] = []
        # Parameters that a backward pass has reached, by name.
        self.reached: set[str] = set()

    def divide(self, model: nn.Module) -> nn.Module:
        """A divided copy of a model, which itself goes to the CPU and stays as it is.

        UserError for a model that has a parameter without dimensions.
        """
        if scalars := [name for name, p in model.named_parameters() if not p.dim()]:
            raise UserError(
                f"hardware.parallel=shard cannot divide '{scalars[0]}', which has no dimension; "
                "give it one, or set hardware.parallel=replicate"
            )
        divided = copy.deepcopy(model.cpu())
        for name, unit in units(divided):
            fully_shard(unit, mesh=self.mesh, reshard_after_forward=True)
            assert isinstance(unit, FSDPModule)
            # The sum of the gradients, as every part of a batch has its share of one loss.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            # Processes may use different parameters of a unit.
            unit.set_reduce_scatter_unused_params(True, recurse=False)
            # Behind the hook that collects the unit.
            unit.register_forward_pre_hook(self._watch(name))
            self.units.append(unit)
        return divided

    def _watch(self, prefix: str) -> Callable[[nn.Module, Any], None]:
        """Note which parameters get a gradient: those that none has reached must have none."""
        watched: set[str] = set()

        def note(unit: nn.Module, _: Any) -> None:
            for name, parameter in unit.named_parameters(prefix):
                # Those of units within are divided now.
                if isinstance(parameter, DTensor) or name in watched:
                    continue
                watched.add(name)
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(
                        lambda _, name=name: self.reached.add(name)
                    )

        return note

    def send(self, now: bool) -> None:
        """Whether the next backward pass sends its gradients, and all that wait, to the others."""
        for unit in self.units:
            unit.set_requires_gradient_sync(now, recurse=False)

    def summed(self) -> AbstractContextManager[None]:
        """FSDP2 needs nothing around the backward passes of a step."""
        return nullcontext()

    def settle(self, model: nn.Module) -> None:
        """None for gradients that no process has, as in a fit of one, instead of zero."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        there = self.team.most(*(int(name in self.reached) for name, _ in named))
        for (_, parameter), some in zip(named, there, strict=True):
            if not some:
                parameter.grad = None
        self.reached.clear()

    # ---------------------------------------------------------------- checkpoints

    def save(self, folder: Path, step: int, state: dict[str, Any], keep: int) -> None:
        """Write a state as the folder ``step_<n>``, each process its part, and keep `keep` of them.

        The folder has its name when all are done. UserError where a process could not write.
        """
        newest = folder / f"step_{step:09d}"
        partial = newest.with_name(f".{newest.name}.tmp")
        rest, parts = taken_out(state)
        if self.team.main:
            with explained(folder):
                for other in folder.glob(".step_*.tmp"):
                    shutil.rmtree(other)
                partial.mkdir(parents=True)
        self.team.share(None)
        try:
            state_dict_saver.save(
                {key(place): part for place, part in parts.items()}, checkpoint_id=partial
            )
        except CheckpointException as error:
            with explained(partial):
                raise reason(error) from error
        if self.team.main:
            checkpoint.save(partial / REST, {**rest, "places": list(parts)})
            with explained(newest):
                if newest.exists():  # and could not be read
                    shutil.rmtree(newest)
                partial.rename(newest)
            checkpoint.keep_newest(folder, newest, keep)
        self.team.share(None)

    def load_newest(self, folder: Path, own: Mapping[str, Any]) -> dict[str, Any] | None:
        """The newest state that all processes can read, whichever number of them wrote it.

        Each has its part of all that is divided in its `own` state (of moments: the parameter).
        """

        def load(path: Path) -> dict[str, Any]:
            state: dict[str, Any] = {}
            problem: UserError | None = None
            try:
                state = checkpoint.load(path, own)
            except UserError as error:
                problem = error
            if any(self.team.most(problem is not None)):
                raise problem or UserError(f"another process cannot read checkpoint {path}")
            for place, tensor in list(tensors(state)):
                model = counterpart(own, place)
                if model is not None and not isinstance(tensor, DTensor):
                    put(state, place, self.part(tensor, model))
            return state

        return checkpoint.load_newest(folder, load)

    def part(self, tensor: Tensor, like: DTensor) -> Tensor:
        """What this process has of a tensor that each of them has whole: nothing is sent."""
        if tensor.shape != like.shape:
            return tensor
        tensor = tensor.to(like.device)
        return distribute_tensor(tensor, self.mesh, like.placements, src_data_rank=None)

    # ---------------------------------------------------------------- what every process must ask

    @staticmethod
    def whole(tensor: Tensor) -> Tensor:
        """All of a tensor of which this process may have a part."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    @staticmethod
    def weights(model: nn.Module) -> dict[str, Tensor]:
        """The weights of a divided model on the CPU of the main process."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: dict[str, Tensor] = get_model_state_dict(model, options=options)  # type: ignore[assignment]
        return weights


def units(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of at least `UNIT` parameters that are not in a smaller one, and then the model.

    Inner ones first; a list of modules is none, for nothing calls it.
    """
    for part, child in model.named_children():
        count = sum(parameter.numel() for parameter in child.parameters())
        if count >= UNIT:
            yield from units(child, f"{name}.{part}".lstrip("."))
    if not isinstance(model, nn.ModuleList | nn.ModuleDict):
        yield name, model


# ------------------------------------------------------------------ a state in a folder

# What of a state is no divided tensor.
REST = "rest.pt"


def read(path: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """The state in a folder: a part of what is divided in one's `own` state, the whole of others.

    Any error of reading is the caller's.
    """
    reader = FileSystemReader(path)
    stored = reader.read_metadata().state_dict_metadata
    state = checkpoint.load(path / REST)
    found: dict[str, Tensor] = {}
    places = {key(place): place for place in state.pop("places")}
    for name, place in places.items():
        model, about = counterpart(own, place), stored[name]
        assert isinstance(about, TensorStorageMetadata)
        if model is None:
            found[name] = torch.empty(about.size, dtype=about.properties.dtype)
        else:
            found[name] = torch.zeros_like(model)
    try:
        state_dict_loader.load(found, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise reason(error) from error
    for name, place in places.items():
        put(state, place, found[name])
    return state


def reason(error: CheckpointException) -> BaseException:
    """What the first process failed with; torch's own error is no `Exception`."""
    return next(iter(error.failures.values()))[0]


def counterpart(own: Any, place: Sequence[str | int]) -> DTensor | None:
    """The divided tensor in that place of one's own state, or on the way to it."""
    for name in place:
        if isinstance(own, Tensor):
            break
        own = own.get(name) if isinstance(own, Mapping) else None
    return own if isinstance(own, DTensor) else None


def key(place: Sequence[str | int]) -> str:
    """The name of a tensor among those of a folder."""
    return "/".join(map(str, place))


def tensors(state: Any, place: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    """All tensors in a nested mapping, and where they are."""
    if isinstance(state, Tensor):
        yield place, state
    elif isinstance(state, Mapping):
        for name, value in state.items():
            yield from tensors(value, (*place, name))


def taken_out(state: Any) -> tuple[Any, dict[Place, DTensor]]:
    """A nested mapping without its divided tensors, and these."""
    parts = {place: each for place, each in tensors(state) if isinstance(each, DTensor)}

    def without(node: Any, place: Place) -> Any:
        if not isinstance(node, Mapping):
            return node
        inner = {name: (*place, name) for name in node}
        return {n: without(node[n], at) for n, at in inner.items() if at not in parts}

    return without(state, ()), parts


def put(state: Any, place: Sequence[str | int], tensor: Tensor) -> None:
    """Set what is in a place of a nested mapping."""
    for name in place[:-1]:
        state = state.setdefault(name, {})
    state[place[-1]] = tensor
