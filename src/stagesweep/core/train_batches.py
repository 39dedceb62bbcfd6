"""The batches of a fit: their order, this process's part of them, noise and augmentations."""

import torch
from torch import Tensor, nn

from stagesweep.base.seeding import derive
from stagesweep.base.spec import Spec
from stagesweep.base.view import Batch, View
from stagesweep.config import schema
from stagesweep.parallel.local_batches import local_rows
from stagesweep.parallel.process_group import ProcessGroup


class TrainBatches:
    """Draws the batches of each epoch; `undivided`: each process reads whole batches."""

    def __init__(
        self,
        view: View,
        settings: schema.Fit,
        spec: Spec,
        seed: int,
        group: ProcessGroup,
        undivided: bool,
    ) -> None:
        self.view, self.settings, self.spec, self.seed = view, settings, spec, seed
        self.group = group
        # Augmentations and whole-batch terms need whole batches.
        self.undivided = undivided or settings.augment is not None

    def order(self, epoch: int) -> list[Tensor]:
        """The rows of each batch of an epoch; depends on seed and epoch alone."""
        generator = torch.Generator().manual_seed(derive(self.seed, "order", epoch))
        return list(self.view.order(self.settings.batch_size, generator, self.settings.sampler))

    def local_rows(self, order: list[Tensor]) -> list[Tensor]:
        """The rows of each batch that this process reads."""
        return order if self.undivided else local_rows(order, self.group)

    def prepare(
        self, model: nn.Module, batch: Batch, samples: int, noise: torch.Generator
    ) -> Batch:
        """Add the model's noise and augmented copies, drawn for all `samples` of the batch."""
        if (sample := getattr(model, "sample_noise", None)) is not None:
            drawn = sample(samples, noise)
            if len(batch["index"]) < samples:
                part = self.group.local_slice(samples)
                drawn = {name: value[part] for name, value in drawn.items()}
            batch |= drawn
        if self.settings.augment is not None:
            batch |= self.settings.augment(batch, self.spec, noise)
        return batch
