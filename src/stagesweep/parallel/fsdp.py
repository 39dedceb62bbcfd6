"""Fully sharded training with torch's FSDP2, and its checkpoint folders.

Each process holds a part of every parameter, gradient and moment, and gathers a unit of the model
while that computes. Imported only by fits with ``hardware.parallel=shard``.
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
from stagesweep.parallel.process_group import ProcessGroup

# Minimum parameters of a unit: a module that is gathered before it computes, and freed after.
UNIT = 1_000_000

# The keys that lead to a tensor in a nested state: ("model", "encoder.weight").
KeyPath = tuple[str | int, ...]
# Writes and reads what is not sharded, and reads a checkpoint.
Save = Callable[[Path, dict[str, Any]], None]
Load = Callable[[Path, Mapping[str, Any]], dict[str, Any]]
Read = Callable[[Path], dict[str, Any]]


class FSDP:
    """Shards models among the processes of a group, which all use them alike.

    A unit must be called as a module, by all processes in the same order. Smaller modules belong to
    the model as a whole; each process may use different ones.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self.group = group
        self.mesh = init_device_mesh(device.type, (group.world_size,))
        self.units: list[FSDPModule] = []
        # Names of the parameters that a backward pass has reached.
        self.reached: set[str] = set()

    def shard(self, model: nn.Module) -> nn.Module:
        """A sharded copy of a model, which itself moves to the CPU.

        UserError for a model that has a parameter without dimensions.
        """
        if scalars := [name for name, p in model.named_parameters() if not p.dim()]:
            raise UserError(
                f"hardware.parallel=shard cannot divide '{scalars[0]}', which has no dimension; "
                "give it one, or set hardware.parallel=replicate"
            )
        sharded = copy.deepcopy(model.cpu())
        for name, unit in units(sharded):
            fully_shard(unit, mesh=self.mesh, reshard_after_forward=True)
            assert isinstance(unit, FSDPModule)
            # Sum the gradients: every part of a batch has its share of one loss.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            # Processes may use different parameters of a unit.
            unit.set_reduce_scatter_unused_params(True, recurse=False)
            # Runs after the hook that gathers the unit.
            unit.register_forward_pre_hook(self._track_gradients(name))
            self.units.append(unit)
        return sharded

    def _track_gradients(self, prefix: str) -> Callable[[nn.Module, Any], None]:
        """Note which parameters get a gradient: the others must have none."""
        tracked: set[str] = set()

        def track(unit: nn.Module, _: Any) -> None:
            for name, parameter in unit.named_parameters(prefix):
                # Parameters of inner units are sharded at this point.
                if isinstance(parameter, DTensor) or name in tracked:
                    continue
                tracked.add(name)
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(
                        lambda _, name=name: self.reached.add(name)
                    )

        return track

    def gradients(self, model: nn.Module) -> "ShardedGradients":
        """The gradients of a sharded model."""
        return ShardedGradients(self, model)

    def local_part(self, tensor: Tensor, like: DTensor) -> Tensor:
        """The local part of a tensor that every process has in full; sends nothing."""
        if tensor.shape != like.shape:
            return tensor
        tensor = tensor.to(like.device)
        return distribute_tensor(tensor, self.mesh, like.placements, src_data_rank=None)

    # ---------------------------------------------------------------- collective operations

    def write_state(self, folder: Path, state: Any, save: Save) -> None:
        """Write a state to a new folder, each process its part; `save` writes what is not sharded.

        The folder gets its name when all processes are done. UserError where one cannot write.
        """
        partial = folder.with_name(f".{folder.name}.tmp")
        rest, shards = split(state)
        if self.group.is_main:
            with explained(folder):
                for other in folder.parent.glob(".step_*.tmp"):
                    shutil.rmtree(other)
                partial.mkdir(parents=True)
        self.group.barrier()
        try:
            state_dict_saver.save(
                {joined_key(path): shard for path, shard in shards.items()}, checkpoint_id=partial
            )
        except CheckpointException as error:
            with explained(partial):
                raise cause(error) from error
        if self.group.is_main:
            save(partial / REST, {**rest, "places": list(shards)})
            with explained(folder):
                if folder.exists():  # and could not be read
                    shutil.rmtree(folder)
                partial.rename(folder)

    def load_state(self, path: Path, own: Mapping[str, Any], load: Load) -> dict[str, Any]:
        """Load a state that any number of processes wrote; UserError unless all can read it.

        Each process gets its part of the tensors that are sharded in its `own` state (for the
        moments of the optimizer: of their parameter).
        """
        state: dict[str, Any] = {}
        problem: UserError | None = None
        try:
            state = load(path, own)
        except UserError as error:
            problem = error
        if any(self.group.all_reduce_max(problem is not None)):
            raise problem or UserError(f"another process cannot read checkpoint {path}")
        for place, tensor in list(tensors(state)):
            like = sharded_at(own, place)
            if like is not None and not isinstance(tensor, DTensor):
                insert(state, place, self.local_part(tensor, like))
        return state

    @staticmethod
    def full_tensor(tensor: Tensor) -> Tensor:
        """The full tensor of one that may be sharded."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    @staticmethod
    def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
        """The full weights of a sharded model, on the CPU of the main process."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: dict[str, Tensor] = get_model_state_dict(model, options=options)  # type: ignore[assignment]
        return weights


class ShardedGradients:
    """Gradients of a sharded model, which FSDP2 sums within the backward pass.

    Has the methods of `GradientExchange`.
    """

    def __init__(self, fsdp: FSDP, model: nn.Module) -> None:
        self.fsdp, self.model = fsdp, model

    def set_is_last_backward(self, last: bool) -> None:
        """Whether the next backward pass is the last of the step, which sends all gradients."""
        for unit in self.fsdp.units:
            unit.set_requires_gradient_sync(last, recurse=False)

    def accumulate(self) -> AbstractContextManager[None]:
        """Nothing is needed around the backward passes of a step."""
        return nullcontext()

    def wait(self) -> None:
        """Set a gradient that no process has to None, as in a single process, instead of zero."""
        reached = self.fsdp.reached
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        found = self.fsdp.group.all_reduce_max(*(int(name in reached) for name, _ in named))
        for (_, parameter), some in zip(named, found, strict=True):
            if not some:
                parameter.grad = None
        reached.clear()


def units(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules to shard, inner ones first: those of at least `UNIT` parameters, then the model.

    Containers (`ModuleList`, `ModuleDict`) are skipped, since nothing calls them.
    """
    for part, child in model.named_children():
        count = sum(parameter.numel() for parameter in child.parameters())
        if count >= UNIT:
            yield from units(child, f"{name}.{part}".lstrip("."))
    if not isinstance(model, nn.ModuleList | nn.ModuleDict):
        yield name, model


# ------------------------------------------------------------------ a state in a folder


# The file of all that is not sharded.
REST = "rest.pt"


def read_state(folder: Path, own: Mapping[str, Any], load: Read) -> dict[str, Any]:
    """Read a state from a folder; `load` reads what is not sharded.

    Gives this process's part of a tensor that is sharded in its `own` state, and the full tensor of
    others. The caller handles reading errors.
    """
    reader = FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    state = load(folder / REST)
    found: dict[str, Tensor] = {}
    paths = {joined_key(path): path for path in state.pop("places")}
    for name, path in paths.items():
        sharded, about = sharded_at(own, path), stored[name]
        assert isinstance(about, TensorStorageMetadata)
        if sharded is None:
            found[name] = torch.empty(about.size, dtype=about.properties.dtype)
        else:
            found[name] = torch.zeros_like(sharded)
    try:
        state_dict_loader.load(found, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise cause(error) from error
    for name, path in paths.items():
        insert(state, path, found[name])
    return state


def cause(error: CheckpointException) -> BaseException:
    """The error of the first process that failed; torch's own is not an `Exception`."""
    return next(iter(error.failures.values()))[0]


def sharded_at(own: Any, path: Sequence[str | int]) -> DTensor | None:
    """The sharded tensor at a path of one's own state, or above it; None when there is none."""
    for name in path:
        if isinstance(own, Tensor):
            break
        own = own.get(name) if isinstance(own, Mapping) else None
    return own if isinstance(own, DTensor) else None


def joined_key(path: Sequence[str | int]) -> str:
    """The name of a tensor in a folder."""
    return "/".join(map(str, path))


def tensors(state: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Tensor]]:
    """All tensors of a nested mapping, with their paths."""
    if isinstance(state, Tensor):
        yield path, state
    elif isinstance(state, Mapping):
        for name, value in state.items():
            yield from tensors(value, (*path, name))


def split(state: Any) -> tuple[Any, dict[KeyPath, DTensor]]:
    """Split a nested mapping into one without sharded tensors, and these tensors by path."""
    shards = {path: each for path, each in tensors(state) if isinstance(each, DTensor)}

    def without(node: Any, path: KeyPath) -> Any:
        if not isinstance(node, Mapping):
            return node
        inner = {name: (*path, name) for name in node}
        return {n: without(node[n], at) for n, at in inner.items() if at not in shards}

    return without(state, ()), shards


def insert(state: Any, path: Sequence[str | int], tensor: Tensor) -> None:
    """Set the tensor at a path of a nested mapping."""
    for name in path[:-1]:
        state = state.setdefault(name, {})
    state[path[-1]] = tensor
