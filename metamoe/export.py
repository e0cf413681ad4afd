"""A unified model in forms that others read: exact, or labelled as what they are."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from metamoe.common.compute import ON_CPU
from metamoe.common.errors import InputFileError, InvalidSettingError
from metamoe.common.files import replaced_folder, write_atomically
from metamoe.common.hub import HUB_FAILURES, hub_error
from metamoe.common.model.artifact import read_weights, router_arrays, seed_of
from metamoe.common.model.card import exported_card, merged_card
from metamoe.common.model.lora import Expert, expert_layers
from metamoe.common.model.seed import load_seed, seed_place, share
from metamoe.common.model.vectors import evidence_paths

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
        write_atomically(new / "start-engine.sh", f'#!/bin/sh\nexec {command} "$@"\n')
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
        SeedMismatchError: the seed model here is not the one it was made from.
        InvalidSettingError: there is no such expert.
    """
    manifest, weights = read_weights(folder)
    by_name: dict[str, list[Expert]] = dict(zip(manifest.experts, ([own] for own in weights.experts), strict=True))
    by_name[SOUP] = weights.experts
    if expert not in by_name:
        raise InvalidSettingError(f"--expert {expert}: there are {', '.join(by_name)}")
    seed = seed_of(manifest, ON_CPU)
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


def export_transformers(folder: Path, out: Path) -> None:
    """Write a unified model so that transformers loads it with ``trust_remote_code=True``, and without this product: the seed's
    weights and the experts' in one file, and ``modeling_metamoe.py``, which computes what this product does.

    Args:
        folder: of the model.
        out: where; replaced when all is there.

    Raises:
        ModelFileError: a file of the model is missing, added or changed.
        SeedMismatchError: the seed model here is not the one it was made from.
    """
    # Not before it is needed: it defines classes of transformers.
    from metamoe import modeling_metamoe
    from metamoe.modeling_metamoe import MetaMoEConfig, MetaMoEForCausalLM, MetaMoEForImages

    manifest, weights = read_weights(folder)
    seed = seed_of(manifest, ON_CPU)
    router, paths = manifest.router, expert_layers(seed, manifest.lora)
    routers: list[dict[str, torch.Tensor]] = [{} for _ in weights.routers]
    for name, array in router_arrays(weights.routers).items():
        number, part = name.split(".")
        routers[int(number)][part] = torch.from_numpy(array)
    values: dict[str, Any] = {
        "seed": _of_any_place(seed.model.config.to_dict()),
        "experts": manifest.experts,
        "lora": manifest.lora.model_dump(mode="json"),
        "router": router.model_dump(mode="json") | {"context_alone": router.context == 1 and not router.learn_context},
        "form": {"ups": list(seed.form.ups), "down": seed.form.down, "activation": seed.form.activation},
        "paths": paths,
        "observed": [path for path in evidence_paths(seed, manifest.lora, router)[0] if path not in paths],
        "shapes": [{part: list(array.shape) for part, array in own.items()} for own in routers],
    }
    config = MetaMoEConfig(**values)
    model_class = MetaMoEForImages if seed.is_image_model else MetaMoEForCausalLM
    kinds = ("AutoModel", "AutoModelForZeroShotImageClassification") if seed.is_image_model else ("AutoModelForCausalLM",)
    place = "modeling_metamoe."
    config.auto_map = {"AutoConfig": place + MetaMoEConfig.__name__} | dict.fromkeys(kinds, place + model_class.__name__)
    changed = (*paths, *config.observed)
    state = {f"seed.{_within(name, changed)}": tensor for name, tensor in seed.model.state_dict().items()}
    for path in paths:
        for name in seed.form.linears:
            for part, matrix in (("a", "lora_A"), ("b", "lora_B")):
                own = [expert[f"{path}.{name}.{matrix}.weight"].float() for expert in weights.experts]
                state[f"seed.{path}.{part}.{name}"] = torch.stack(own)
    places = ["router"] if router.decide == "embedding" else [f"seed.{path}.router" for path in paths]
    for at, arrays in zip(places, routers, strict=False):
        state |= {f"{at}.{part}": array for part, array in arrays.items()}
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(state, assign=True)
    if (how := getattr(seed.model, "generation_config", None)) is not None:
        model.generation_config = how
    with replaced_folder(out) as new:
        model.save_pretrained(new)
        seed.tokenizer.save_pretrained(new)
        if seed.processor is not None:
            seed.processor.save_pretrained(new)
        write_atomically(new / "modeling_metamoe.py", Path(modeling_metamoe.__file__).read_bytes())
        write_atomically(new / "README.md", exported_card(manifest, kinds[0]))


def _of_any_place(config: dict[str, Any]) -> dict[str, Any]:
    """A config that says neither where the seed lay nor in what its weights are held, which is for whoever loads the model."""
    return {k: _of_any_place(v) if isinstance(v, dict) else v for k, v in config.items() if k not in ("dtype", "_name_or_path")}


def _within(name: str, changed: Sequence[str]) -> str:
    """A parameter's name, where some sublayers lie in others."""
    inside = next((path for path in changed if name.startswith(f"{path}.")), None)
    return f"{inside}.base{name.removeprefix(inside)}" if inside else name


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
