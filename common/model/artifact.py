"""The unified model on disk: PEFT adapters, ``router.safetensors`` and a manifest of hashes.

::

    manifest.json                      format, seed, settings, class names, SHA-256 of every other file
    router.safetensors                 <i>.rows [K, D], <i>.biases [K], <i>.context [] of the i-th decision, on D features;
                                       of Gaussian ones also <i>.centre [D], <i>.projection [D, D], <i>.scales [K, D] and
                                       <i>.factors [K, r, D]
    experts/<name>/                    adapter_config.json, adapter_model.safetensors: a stock PEFT adapter
    README.md                          the model card, for people and hubs; no hash covers it
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, FieldSerializationInfo, ValidationError, field_serializer, model_validator
from safetensors.numpy import load_file, save_file

from metamoe.common import config
from metamoe.common.compute import Place, device_of, place
from metamoe.common.errors import ModelFileError, SeedMismatchError, first_problem
from metamoe.common.files import replaced_folder, write_atomically, write_json
from metamoe.common.model.card import CARD, model_card, seed_licence
from metamoe.common.model.lora import Expert, load_adapter, save_adapter
from metamoe.common.model.moe import UnifiedModel
from metamoe.common.model.router import Quadratic, RouterWeights
from metamoe.common.model.seed import Seed, seed_at, seed_place

FORMAT = 6
_OLDER = 5
_SINCE_6 = {"statistics", "shape_rank", "shape_pooled", "shape_identity", "mixing"}
"""Settings of the router that format 5 does not have. A model that does without them is written in that format."""
_IN_5 = {"statistics": "mean", "mixing": "layers"}
"""What there was in place of them."""
MANIFEST = "manifest.json"
_ROUTER = "router.safetensors"


@dataclass(frozen=True)
class UnifiedWeights:
    """What a unified model consists of beside the seed: each expert's LoRA matrices (float16) and each deciding layer's
    router.
    """

    experts: list[Expert]
    routers: list[RouterWeights]


class _Format(BaseModel):
    format: int


_LATER = ("background", "text", "block_words")
"""Fields that came later than models that are in use."""


class Manifest(BaseModel):
    """Contents of manifest.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    seed_model: str
    seed_fingerprint: str
    experts: list[str]
    lora: config.Lora
    router: config.Router
    prompt: str
    list_choices: config.ListChoices
    prompt_tokens: int
    answer_tokens: int
    classes: list[str]
    background: config.Colour = "white"
    text: bool = False
    block_words: int = 64
    files: dict[str, str]

    @model_validator(mode="before")
    @classmethod
    def _of_format_5(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("format") == _OLDER and isinstance(values.get("router"), dict):
            return {**values, "router": {**values["router"], **_IN_5}}
        return values

    @field_serializer("router")
    def _in_its_format(self, router: config.Router, info: FieldSerializationInfo) -> dict[str, Any]:
        left_out = _SINCE_6 if self.format == _OLDER else None
        return router.model_dump(mode="json", by_alias=bool(info.by_alias), exclude=left_out)

    @property
    def expert_names(self) -> list[str]:
        """Names of what the router chooses among: the experts, and the seed if it is one more."""
        return [*self.experts, "seed"] if self.router.seed_expert else self.experts

    @property
    def model_hash(self) -> str:
        """One hash for the whole model: SHA-256 over the manifest, but for where its seed was found."""
        # A model that takes what was once the only way has the hash that it had then.
        left_out = {"seed_model"} | {name for name in _LATER if getattr(self, name) == Manifest.model_fields[name].default}
        text = json.dumps(self.model_dump(mode="json", exclude=left_out), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Loaded:
    """A unified model ready for use, where it computes."""

    model: UnifiedModel
    seed: Seed
    manifest: Manifest


def save_model(
    folder: Path, seed: Seed, settings: config.Settings, names: list[str], classes: list[str], weights: UnifiedWeights
) -> Manifest:
    """Write a unified model; the folder appears, or is replaced, only when it is whole.

    Args:
        folder: where.
        seed: the seed model, recorded by reference and fingerprint.
        settings: the run's.
        names: of the experts, in order.
        classes: names among which the model chooses unless told otherwise.
        weights: the model's.
    """
    router = settings.router.model_copy(update={"statistics": "shape" if settings.by_shape else "mean"})
    with replaced_folder(folder) as new:
        for name, expert in zip(names, weights.experts, strict=True):
            save_adapter(new / "experts" / name, seed, settings.lora, expert)
        save_file(router_arrays(weights.routers), new / _ROUTER)
        files = {str(f.relative_to(new)): _sha256(f) for f in sorted(new.rglob("*")) if f.is_file()}
        manifest = Manifest(
            format=_format_of(router),
            seed_model=settings.seed_model,
            seed_fingerprint=seed.fingerprint,
            experts=names,
            lora=settings.lora,
            router=router,
            prompt=settings.data.prompt,
            list_choices=settings.data.list_choices,
            background=settings.data.background,
            text=settings.data.source == "text",
            block_words=settings.data.block_words,
            prompt_tokens=settings.data.prompt_tokens,
            answer_tokens=settings.data.answer_tokens,
            classes=classes,
            files=files,
        )
        write_json(new / MANIFEST, manifest.model_dump(mode="json", by_alias=True))
        write_card(new, manifest, settings)
    return manifest


def write_card(folder: Path, manifest: Manifest, settings: config.Settings, table: Sequence[str] = ()) -> None:
    """Write the model card of a unified model, with a table of how good it is once that is known."""
    card = model_card(manifest, settings, seed_licence(seed_place(manifest.seed_model)), table)
    write_atomically(folder / CARD, card)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a unified model.

    Raises:
        ModelFileError: there is none, or it is not one of ours.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
        # Before anything else: a manifest of another format has other fields.
        found = _Format.model_validate_json(text).format
        if found not in (_OLDER, FORMAT):
            raise ModelFileError(f"{folder / MANIFEST} has format {found}; this version reads {_OLDER} and {FORMAT}")
        return Manifest.model_validate_json(text)
    except FileNotFoundError as error:
        raise ModelFileError(
            f"{folder} holds no {MANIFEST}; give the folder of a unified model, such as runs/demo/model"
        ) from error
    except ValidationError as error:
        raise ModelFileError(f"{folder / MANIFEST}: {first_problem(error)}") from error


def read_weights(folder: Path) -> tuple[Manifest, UnifiedWeights]:
    """Manifest and weights of a unified model, after checking every file's hash.

    Raises:
        ModelFileError: a file is missing, added or changed.
    """
    manifest = read_manifest(folder)
    found = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} - {MANIFEST, CARD}
    if difference := sorted(found ^ set(manifest.files)):
        raise ModelFileError(f"{folder}: {difference[0]} is {'not in the manifest' if difference[0] in found else 'missing'}")
    for name, digest in manifest.files.items():
        if _sha256(folder / name) != digest:
            raise ModelFileError(f"{folder / name} has changed since the model was written")
    experts = [load_adapter(folder / "experts" / name) for name in manifest.experts]
    return manifest, UnifiedWeights(experts, routers_from(load_file(folder / _ROUTER)))


def intact(folder: Path) -> bool:
    """Whether a unified model is there, every file as it was written."""
    try:
        read_weights(folder)
    except ModelFileError:
        return False
    return True


def load_model(folder: Path, at: Place | None = None) -> Loaded:
    """Load a unified model, after checking every file's hash and the seed's.

    Args:
        folder: where it is.
        at: where it computes; None for a GPU where there is one, in float32.

    Raises:
        ModelFileError: a file is missing, added or changed.
        SeedMismatchError: the seed model here is not the one it was made from.
    """
    manifest, weights = read_weights(folder)
    seed = seed_of(manifest, at or place(device_of("auto"), "float32"))
    model = UnifiedModel(seed, weights.experts, manifest.lora, manifest.router, weights.routers).eval().requires_grad_(False)
    return Loaded(model, seed, manifest)


def seed_of(manifest: Manifest, at: Place) -> Seed:
    """The seed that a model was made from.

    Raises:
        SeedMismatchError: it is another one here.
    """
    seed = seed_at(manifest.seed_model, at)
    if seed.fingerprint != manifest.seed_fingerprint:
        raise SeedMismatchError(f"the model was made from another seed than {manifest.seed_model!r} is here")
    return seed


def _format_of(router: config.Router) -> int:
    """The lowest format that has all these settings."""
    new = any(getattr(router, name) != value for name, value in _IN_5.items())
    return FORMAT if new or router.decide == "embedding" else _OLDER


def router_arrays(routers: list[RouterWeights]) -> dict[str, np.ndarray]:
    """Routers as named float32 arrays; :func:`routers_from` is the inverse."""
    parts: dict[str, Any] = {}
    for i, router in enumerate(routers):
        parts |= {f"{i}.rows": router.rows, f"{i}.biases": router.biases, f"{i}.context": router.context}
        if router.quadratic is not None:
            parts |= {f"{i}.{name}": array for name, array in vars(router.quadratic).items()}
    return {name: np.asarray(array, dtype=np.float32, order="C") for name, array in parts.items()}


def routers_from(arrays: dict[str, np.ndarray]) -> list[RouterWeights]:
    routers = []
    for i in range(sum(name.endswith(".rows") for name in arrays)):
        own = {name.removeprefix(f"{i}."): array for name, array in arrays.items() if name.startswith(f"{i}.")}
        linear = own.pop("rows"), own.pop("biases"), float(own.pop("context"))
        routers.append(RouterWeights(*linear, Quadratic(**own) if own else None))
    return routers


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
