"""A unified model in forms that others read: exact, or labelled as what they are."""

import shlex
from pathlib import Path

import torch
from huggingface_hub import HfApi

from metamoe.common.compute import ON_CPU
from metamoe.common.errors import InputFileError, InvalidSettingError
from metamoe.common.files import replaced_folder, write_atomically
from metamoe.common.hub import HUB_FAILURES, hub_error
from metamoe.common.model.artifact import read_weights
from metamoe.common.model.card import merged_card
from metamoe.common.model.lora import Expert
from metamoe.common.model.seed import load_seed, seed_at, seed_place, share

SOUP = "soup"


def export_adapters(folder: Path, out: Path) -> str:
    """Write the experts as PEFT adapters, a folder each, exactly as they are in the model.

    Args:
        folder: of the model.
        out: where; replaced when all is there.

    Returns:
        The command line that starts vLLM with them.

    Raises:
        ModelFileError: a file of the model is missing, added or changed.
        InputFileError: the model is one of images.
    """
    manifest, _ = read_weights(folder)
    seed = load_seed(manifest.seed_model)
    if seed.is_image_model:
        raise InputFileError(f"{folder} is a model of images, and engines serve adapters of text; its experts are PEFT folders")
    modules = [f"{name}={out.absolute() / name}" for name in manifest.experts]
    words = ["vllm", "serve", seed_place(manifest.seed_model), "--served-model-name", "seed", "--enable-lora"]
    words += ["--max-lora-rank", str(_engine_rank(manifest.lora.rank)), "--max-loras", str(len(modules))]
    command = shlex.join([*words, "--lora-modules", *modules])
    with replaced_folder(out) as new:
        for name in manifest.experts:
            (new / name).mkdir()
            for file in (folder / "experts" / name).iterdir():
                (new / name / file.name).write_bytes(file.read_bytes())
        write_atomically(new / "start-engine.sh", f"#!/bin/sh\n{command}\n")
    return command


def _engine_rank(rank: int) -> int:
    """The least rank that vLLM lays out for at which an adapter fits."""
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= rank), rank)


@torch.no_grad()
def export_merged(folder: Path, out: Path, expert: str) -> None:
    """Write one dense model as transformers reads it: W + (alpha / r) B A of one expert, or with the mean of all such terms.

    Args:
        folder: of the model.
        out: where; replaced when all is there.
        expert: a name, or "soup" for the mean: neither is the unified model.

    Raises:
        ModelFileError: a file of the model is missing, added or changed.
        InvalidSettingError: there is no such expert.
    """
    manifest, weights = read_weights(folder)
    by_name: dict[str, list[Expert]] = dict(zip(manifest.experts, ([own] for own in weights.experts), strict=True))
    by_name[SOUP] = weights.experts
    if expert not in by_name:
        raise InvalidSettingError(f"--expert {expert}: there are {', '.join(by_name)}")
    seed = seed_at(manifest.seed_model, ON_CPU)
    model = share(seed.model)
    chosen, scale = by_name[expert], manifest.lora.alpha / manifest.lora.rank
    for name in {matrix.rsplit(".", 2)[0] for matrix in chosen[0]}:
        weight = model.get_parameter(f"{name}.weight")
        terms = [own[f"{name}.lora_B.weight"].float() @ own[f"{name}.lora_A.weight"].float() for own in chosen]
        # A new tensor: the old one is the seed's.
        changed = weight + scale / len(terms) * sum(terms[1:], terms[0])
        model.get_submodule(name).weight = torch.nn.Parameter(changed, requires_grad=False)
    with replaced_folder(out) as new:
        model.save_pretrained(new)
        seed.tokenizer.save_pretrained(new)
        if seed.processor is not None:
            seed.processor.save_pretrained(new)
        write_atomically(new / "README.md", merged_card(manifest, expert, expert == SOUP))


def push_model(folder: Path, repository: str, private: bool) -> str:
    """Upload a model's folder to a hub, as it is.

    Args:
        folder: of the model; every hash is checked first.
        repository: ORG/NAME; made where there is none.
        private: whether a new one is.

    Returns:
        Where it is then.

    Raises:
        ModelFileError: a file of the model is missing, added or changed.
        HubError: the hub does not take it.
    """
    read_weights(folder)
    try:
        hub = HfApi()
        hub.create_repo(repository, private=private, exist_ok=True)
        return str(hub.upload_folder(folder_path=folder, repo_id=repository, commit_message="A unified model").commit_url)
    except HUB_FAILURES as error:
        raise hub_error("push", repository, error) from error
