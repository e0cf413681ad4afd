"""Fixtures: real transformers classes in tiny configurations, real data in small parts."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from metamoe.common.config import Settings
from metamoe.common.model.lora import Expert, expert_shapes
from metamoe.common.model.seed import Seed, load_seed
from metamoe.common.presets import validated
from metamoe.simulations.train_seed import tokenizer_for

WORDS = ["LATIN SMALL LETTER A", "LATIN SMALL LETTER B", "DIGIT ONE", "WHITE CIRCLE", "BLACK SQUARE"]


@pytest.fixture(scope="session", autouse=True)
def _rooms_under_metamoe_alone() -> Iterator[None]:
    """Tests run beside the rooms' folders, where ``import common`` would work, as it does nowhere else."""

    class Nowhere:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name in ("audit", "client", "common", "deploy", "server", "simulations"):
                raise ModuleNotFoundError(f"{name} is installed as metamoe.{name}")

    sys.meta_path.insert(0, Nowhere)
    yield
    sys.meta_path.remove(Nowhere)


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def seed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights on disk: two vision layers of width 16, images of 32 x 32 in patches of 8."""
    folder = tmp_path_factory.mktemp("seed")
    tokenizer = tokenizer_for(WORDS)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 8}
    text = tower | {"vocab_size": len(tokenizer), "max_position_embeddings": 24}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
    vision = tower | {"image_size": 32, "patch_size": 8, "initializer_factor": 20.0}
    torch.manual_seed(0)
    config = CLIPConfig(vision_config=vision, text_config=text | special, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"height": 32, "width": 32}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def seed(seed_folder: Path) -> Seed:
    return load_seed.__wrapped__(str(seed_folder))


@pytest.fixture
def settings() -> Settings:
    """Small numbers everywhere, and the paper's router deciding once; the tiny seed is passed beside it."""
    router = {
        "context": 0.4,
        "learn-context": True,
        "evidence": "layer",
        "vectors": "private",
        "seed-expert": False,
        "top-k": 1,
        "renormalise": False,
        "temperature": 1,
    }
    return validated(
        {"clients": 3, "lora": {"rank": 2, "alpha": 4}, "router": router, "router-training": {"supervision": "both"}}
    )


def tiny_options(**values: object) -> list[str]:
    """Options of a command for the least run of pictures, with these settings by their dotted names."""
    least: dict[str, object] = {"data.source": "images", "proxies.count": 4, "proxies.pool": 8, "lora.rank": 2}
    least |= {"lora.first-layer": 1, "expert-training.epochs": 1} | values
    return [word for name, value in least.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture
def small(seed_folder: Path) -> Settings:
    return small_run(seed_folder)


def small_run(seed_folder: Path) -> Settings:
    """A whole run in seconds: the tiny seed, experts on the upper of its two layers, and small parts of the built-in data."""
    return validated(
        {
            "seed-model": str(seed_folder),
            "data": {"public-samples": 300, "private-samples": 40},
            "proxies": {"count": 20, "pool": 100},
            "lora": {"rank": 2, "alpha": 4, "first-layer": 1},
            "expert-training": {"epochs": 1, "batch-size": 16},
            "router-training": {"supervision": "task", "epochs": 1, "batch-size": 16},
        }
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, seed_folder: Path) -> Path:
    """The folder of a small run that came to its end; not to be changed."""
    from metamoe.simulations.local import run_local

    out = tmp_path_factory.mktemp("finished")
    run_local(small_run(seed_folder), out)
    return out


@pytest.fixture
def identity() -> Iterator[None]:
    """Flower sets this for each task; without it no message can be made."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    yield
    TaskIdentity._task_id = TaskIdentity._run_id = TaskIdentity._node_id = None


def random_expert(seed: Seed, settings: Settings, number: int) -> Expert:
    """An expert whose matrices are large enough to matter."""
    generator = torch.Generator().manual_seed(number)
    shapes = expert_shapes(seed, settings.lora)
    return {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in shapes.items()}


def random_pixels(count: int, number: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(number))


def random_features(rows: int, columns: int, number: int = 0) -> np.ndarray:
    return np.random.default_rng(number).normal(size=(rows, columns))


@pytest.fixture
def run_metamoe(monkeypatch: pytest.MonkeyPatch):
    """Run the command in this process; returns its exit code."""
    from metamoe import cli

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["metamoe", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    return run
