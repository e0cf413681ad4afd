import json
from pathlib import Path

import numpy as np
import pytest
import torch

from metamoe.common.config import Settings
from metamoe.common.errors import ModelFileError, SeedMismatchError
from metamoe.common.files import replaced_folder, write_atomically
from metamoe.common.model.artifact import UnifiedWeights, load_model, save_model
from metamoe.common.model.batch import class_logits, text_features
from metamoe.common.model.lora import rounded
from metamoe.common.model.moe import UnifiedModel
from metamoe.common.model.router import RouterWeights
from metamoe.common.model.seed import Seed
from metamoe.common.presets import changed
from tests.conftest import random_expert, random_features, random_pixels

NAMES = ["one", "two", "three"]


@pytest.fixture
def weights(seed: Seed, small: Settings) -> UnifiedWeights:
    router = RouterWeights(
        random_features(4, 2 * seed.width).astype(np.float32), np.zeros(4, dtype=np.float32), float(np.float32(0.3))
    )
    return UnifiedWeights([rounded(random_expert(seed, small, k)) for k in range(3)], [router])


@pytest.fixture
def folder(seed: Seed, small: Settings, weights: UnifiedWeights, tmp_path: Path) -> Path:
    save_model(tmp_path / "model", seed, small, NAMES, ["a", "b"], weights)
    return tmp_path / "model"


def test_a_saved_model_loads_to_equal_bits(seed: Seed, small: Settings, weights: UnifiedWeights, folder: Path) -> None:
    loaded = load_model(folder)
    assert loaded.manifest.experts == NAMES
    assert loaded.manifest.classes == ["a", "b"]
    original = UnifiedModel(seed, weights.experts, small.lora, small.router, weights.routers).eval()
    with torch.inference_mode():
        pixels = random_pixels(4)
        assert torch.equal(loaded.model(pixels)[0], original(pixels)[0])
        assert torch.equal(loaded.model(pixels)[1][0], original(pixels)[1][0])


def test_equal_models_have_equal_hashes(
    seed: Seed, small: Settings, weights: UnifiedWeights, folder: Path, tmp_path: Path
) -> None:
    again = save_model(tmp_path / "again", seed, small, NAMES, ["a", "b"], weights)
    assert again.model_hash == load_model(folder).manifest.model_hash
    routed = small.model_copy(update={"router": small.router.model_copy(update={"top_k": 3})})
    assert save_model(tmp_path / "routed", seed, routed, NAMES, ["a", "b"], weights).model_hash != again.model_hash
    assert save_model(tmp_path / "named", seed, small, NAMES, ["a", "c"], weights).model_hash != again.model_hash
    weights.routers[0].rows[0, 0] += 1
    other = save_model(tmp_path / "other", seed, small, NAMES, ["a", "b"], weights)
    assert other.model_hash != again.model_hash


def test_a_model_by_means_is_written_and_read_as_it_was_before_there_were_shapes(
    seed: Seed, small: Settings, weights: UnifiedWeights, tmp_path: Path
) -> None:
    settings = changed(small, ["router.statistics=mean"])
    written = save_model(tmp_path / "old", seed, settings, NAMES, ["a", "b"], weights)
    text = json.loads((tmp_path / "old" / "manifest.json").read_text())
    assert text["format"] == 5
    assert not {"statistics", "mixing", "shape-rank"} & set(text["router"])
    found = load_model(tmp_path / "old").manifest
    assert (found.router.statistics, found.router.mixing, found.model_hash) == ("mean", "layers", written.model_hash)


@torch.inference_mode()
def test_a_folder_of_the_last_format_loads_to_the_same_answers() -> None:
    """It was written on the built-in seed by the last version that knew format 5 alone, whose hash and scores these are."""
    loaded = load_model(Path(__file__).parent / "format-5")
    assert loaded.manifest.format == 5
    assert loaded.manifest.model_hash == "b8890179eddb9b28ab8a485dcb401ae04e36b01a6405546a7bd250de9f37fd05"
    encoded, decisions = loaded.model(torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32))
    texts = text_features(loaded.seed, loaded.manifest.classes, loaded.manifest.prompt)
    scores = class_logits(loaded.model.backbone, encoded, texts)
    expected = torch.tensor([[-1.5393676, -0.4058392, 4.5962667]])
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=0)
    expected = torch.tensor([-1.9500501, -1.4096187, -0.4885804])
    torch.testing.assert_close(decisions[0][0, 0], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "file", ["router.safetensors", "experts/two/adapter_model.safetensors", "experts/one/adapter_config.json"]
)
def test_a_changed_or_missing_file_is_found(folder: Path, file: str) -> None:
    content = bytearray((folder / file).read_bytes())
    content[-1] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(ModelFileError, match="has changed"):
        load_model(folder)
    (folder / file).unlink()
    with pytest.raises(ModelFileError, match="is missing"):
        load_model(folder)


def test_an_added_file_and_a_broken_manifest_are_found(folder: Path) -> None:
    (folder / "more.bin").write_bytes(b"")
    with pytest.raises(ModelFileError, match="not in the manifest"):
        load_model(folder)
    (folder / "more.bin").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    for change in ({"format": 1}, {"experts": 3}, {"surprise": 1}):
        (folder / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ModelFileError, match=f"{next(iter(change))}"):
            load_model(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ModelFileError):
        load_model(folder)
    with pytest.raises(ModelFileError, match=r"holds no manifest\.json"):
        load_model(folder / "experts")


def test_another_seed_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"seed_fingerprint": "0" * 64}))
    with pytest.raises(SeedMismatchError):
        load_model(folder)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with replaced_folder(target) as new:
        (new / "a").write_text("old")

    def die_halfway() -> None:
        with replaced_folder(target) as new:
            (new / "a").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        die_halfway()
    assert (target / "a").read_text() == "old"
    write_atomically(tmp_path / "file", "old")
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "file", 3)
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "model"]
