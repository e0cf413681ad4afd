"""Stage 2 at the server: what arrives is written to disk at once, and read back when the model is assembled."""

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from metamoe.common.config import Lora
from metamoe.common.files import replaced_folder
from metamoe.common.model.lora import Expert, load_adapter, save_adapter
from metamoe.common.model.seed import Seed

ADAPTER = "adapter_model.safetensors"
_VECTORS = "routing_vectors.safetensors"


def store_expert(folder: Path, seed: Seed, lora: Lora, arrays: dict[str, np.ndarray]) -> None:
    """Write a client's reply: the LoRA matrices as a PEFT adapter, the routing vectors, if it sent any, beside it."""
    vectors = {name: array for name, array in arrays.items() if name == "routing-vectors"}
    matrices = {name: torch.from_numpy(array) for name, array in arrays.items() if name not in vectors}
    with replaced_folder(folder) as new:
        save_adapter(new, seed, lora, matrices)
        save_file(vectors, new / _VECTORS)


def stored_vectors(folder: Path) -> np.ndarray | None:
    """Of what :func:`store_expert` wrote the routing vectors [L, d], or None."""
    return load_file(folder / _VECTORS).get("routing-vectors")


def stored_arrays(folder: Path) -> dict[str, np.ndarray]:
    """Read what :func:`store_expert` wrote, as it was given."""
    return {name: matrix.numpy() for name, matrix in load_adapter(folder).items()} | load_file(folder / _VECTORS)


def stored_expert(folder: Path) -> tuple[Expert, np.ndarray | None]:
    """Read what :func:`store_expert` wrote: the LoRA matrices, and the routing vectors [L, d] or None."""
    return load_adapter(folder), stored_vectors(folder)
