"""Images as a seed takes them: held as bytes, and made into numbers on the device, batch by batch, as they are needed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from metamoe.common.compute import moved
from metamoe.common.model.seed import Seed

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 256


@dataclass(frozen=True)
class Pixels:
    """Images cut to their size, uint8 [N, 3, H, W], and what each of the 256 values is to the seed in each channel, float32
    [3, 256], on the seed's device. An index gives float32 [B, 3, H, W] there.
    """

    values: Tensor
    table: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        return _numbers(self.values[rows], self.table)


def pixel_values(seed: Seed, images: Sequence[object]) -> Tensor:
    """PIL images as the seed's input. float32 [B, 3, H, W]."""
    return seed.processor(images=list(images), return_tensors="pt")["pixel_values"]


def batches(seed: Seed, dataset: "Dataset", size: int = BATCH, workers: int = 0) -> Iterator[Tensor]:
    """A data set's images in order, ``size`` at a time, decoded ahead of their use by ``workers`` processes; by none, here.
    float32 [<= size, 3, H, W], on the seed's device.
    """
    table = _table(seed)
    return (_numbers(values, table) for values in _decoded(seed, dataset, size, workers))


def all_pixels(seed: Seed, datasets: Sequence["Dataset"], workers: int = 0) -> Pixels:
    """All images of some data sets one after the other, decoded once."""
    vision = seed.model.config.vision_config
    shape = sum(map(len, datasets)), vision.num_channels, vision.image_size, vision.image_size
    values, done = torch.empty(shape, dtype=torch.uint8), 0
    # Filled, not joined, which would need them twice.
    for dataset in datasets:
        for batch in _decoded(seed, dataset, BATCH, workers):
            values[done : done + len(batch)] = batch
            done += len(batch)
    return Pixels(values, _table(seed))


def _decoded(seed: Seed, dataset: "Dataset", size: int, workers: int) -> DataLoader[Any]:
    # Its own generator: a loader draws from it, and the run's random numbers must not depend on that.
    own = torch.Generator()
    return DataLoader(dataset, size, num_workers=workers, collate_fn=partial(_collated, seed), generator=own)


def _collated(seed: Seed, rows: Sequence[dict[str, Any]]) -> Tensor:
    return cut(seed, [row["image"] for row in rows])


def cut(seed: Seed, images: Sequence[object]) -> Tensor:
    """PIL images in the size the seed takes, before their values are scaled. uint8 [B, 3, H, W]."""
    return seed.processor(images=list(images), return_tensors="pt", do_rescale=False, do_normalize=False)["pixel_values"]


@lru_cache(maxsize=4)
def _table(seed: Seed) -> Tensor:
    """What the seed's own processor makes of every value: so numbers are its own to the last digit."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    made = seed.processor(images=[Image.fromarray(ramp)], return_tensors="pt", do_resize=False, do_center_crop=False)
    return made["pixel_values"][0].flatten(1).to(seed.model.device)


def _numbers(values: Tensor, table: Tensor) -> Tensor:
    """float32 of uint8 values [B, 3, H, W], on the table's device."""
    values = moved(values, table.device)
    numbers = torch.empty(values.shape, device=table.device)
    for channel, row in enumerate(table):
        own = values[:, channel]
        numbers[:, channel] = row.index_select(0, own.flatten().int()).view(own.shape)
    return numbers
