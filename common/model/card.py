"""Model cards: what a model is, for people and for hubs. A card is no part of the model: its hash does not cover it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

from metamoe.common.config import Settings

if TYPE_CHECKING:
    from metamoe.common.model.artifact import Manifest

CARD = "README.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(manifest: "Manifest", settings: Settings, licence: str | None, table: Sequence[str] = ()) -> str:
    """The card of a unified model.

    Args:
        manifest: the model's.
        settings: the run's.
        licence: the seed's, as its own card names it; None where it has none.
        table: lines of how good it is; none before it is known.
    """
    privacy, router, lora = settings.privacy, manifest.router, manifest.lora
    covered = [f"means of stage 1 at epsilon {privacy.epsilon:g}, delta {privacy.delta:g}"] if privacy.vectors != "none" else []
    if privacy.expert != "none":
        covered.append(f"experts by DP-SGD at epsilon {privacy.expert_epsilon:g}, delta {privacy.expert_delta:g}")
    trained = " and trained on public samples" if settings.router_training.supervision != "none" else ""
    shapes = " and covariances" if manifest.router.statistics == "shape" else ""
    lines = [
        _metadata(manifest.seed_model, licence, bool(manifest.classes)),
        "# A unified model by MetaMoE-FL",
        "",
        f"{len(manifest.experts)} experts, each trained by one client on data that stayed with it, as LoRA on the feed-forward "
        f"sublayers of one frozen seed, under a router made of statistics of each client's data{trained}.",
        "",
        "| | |",
        "|---|---|",
        f"| seed model | `{manifest.seed_model}`, {licence or 'its own licence holds'} |",
        f"| experts | {', '.join(manifest.experts)} |",
        f"| LoRA | rank {lora.rank}, alpha {lora.alpha}, from layer {lora.first_layer} |",
        f"| router | decides {router.decide}, top-{router.top_k}{', the seed is one of its choices' * router.seed_expert} |",
        f"| preset, seed of the run | {settings.preset}, {settings.seed} |",
        *(f"| data, {name} | `{source}` |" for name, source in settings.data_sources.items()),
        f"| differential privacy | {'; '.join(covered) or 'none'} |",
        f"| hash | {manifest.model_hash} |",
        "",
        f"What left each client: means{shapes} of the seed's states over its samples, and its expert's matrices; no sample. "
        "Matrices that were trained on samples can tell of them; differential privacy bounds how much, where it is named.",
        "",
        "```python",
        "import metamoe",
        "",
        'model = metamoe.load("FOLDER")',
        "```",
        "",
        "`experts/` holds stock PEFT adapters of the seed.",
        "",
    ]
    return "\n".join([*lines, *(["## Accuracy, %", "", *table, ""] if table else [])])


def merged_card(manifest: "Manifest", expert: str, soup: bool) -> str:
    """The card of a dense model out of a unified one."""
    what = "the mean of all experts (a soup)" if soup else f"the expert `{expert}` alone"
    return "\n".join(
        [
            _metadata(manifest.seed_model, None, bool(manifest.classes)),
            f"# Dense: the seed with {what}",
            "",
            f"`{manifest.seed_model}` with LoRA matrices added to its weights: {what}. It has no router, and is **not** the "
            f"unified model {manifest.model_hash}, out of which it was made by MetaMoE-FL.",
            "",
        ]
    )


def exported_card(manifest: "Manifest", loader: str, own_code: bool = True) -> str:
    """The card of a unified model that transformers loads, by code of ours beside it or by its own."""
    return "\n".join(
        [
            _metadata(manifest.seed_model, None, bool(manifest.classes), "transformers"),
            "# A unified model by MetaMoE-FL, for transformers",
            "",
            f"`{manifest.seed_model}` with {len(manifest.experts)} experts and their router: the unified model "
            f"{manifest.model_hash}.{' Its code is `modeling_metamoe.py`, in this folder.' * own_code}",
            "",
            "```python",
            f"from transformers import {loader}",
            "",
            f'model = {loader}.from_pretrained("FOLDER"{", trust_remote_code=True" * own_code})',
            "```",
            "",
        ]
    )


def seed_licence(place: str) -> str | None:
    """The licence that the card in a seed's folder names."""
    file = Path(place) / CARD
    if not file.is_file():
        return None
    try:
        licence = ModelCard.load(file, ignore_metadata_errors=True).data.get("license")
    except (ValueError, OSError):
        return None
    return licence if isinstance(licence, str) else None


def _metadata(seed: str, licence: str | None, images: bool, library: str = "metamoe-fl") -> str:
    """What hubs read at the head of a card."""
    told = ModelCardData(
        base_model=seed if _HUB_ID.fullmatch(seed) else None,
        license=licence,
        library_name=library,
        pipeline_tag="zero-shot-image-classification" if images else "text-generation",
        tags=["mixture-of-experts", "federated-learning", "lora", "peft"],
    )
    return f"---\n{told.to_yaml()}\n---\n"
