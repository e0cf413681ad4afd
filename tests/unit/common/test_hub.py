"""Sets from a hub, by stand-ins on disk that have the real sets' columns, features and parts (facts from their cards)."""

import io
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from metamoe.common.config import Data
from metamoe.common.data.hub import hub_name, load_from_hub
from metamoe.common.data.images import load_images
from metamoe.common.data.questions import load_questions
from metamoe.common.errors import DataFormatError, HubError
from metamoe.common.presets import load_settings, preset_names

TEXT = Value("string")
CHOICES = {"choices": {"label": List(TEXT), "text": List(TEXT)}}
NAMED = {"label": ["A", "B"], "text": ["fire", "water"]}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def stand_in(folder: Path, features: dict, parts: dict[str, list[dict]], configuration: str = "data") -> str:
    """A set on disk as a hub holds it: Parquet files named after its parts."""
    for part, rows in parts.items():
        (folder / configuration).mkdir(parents=True, exist_ok=True)
        file = folder / configuration / f"{part}-00000-of-00001.parquet"
        Dataset.from_list(rows, features=Features(features)).to_parquet(file)
    return str(folder)


SETS = {
    "tau/commonsense_qa": (
        {"id": TEXT, "question": TEXT, "question_concept": TEXT, **CHOICES, "answerKey": TEXT},
        {"id": "1", "question": "Wet?", "question_concept": "wet", "choices": NAMED, "answerKey": "B"},
        {"answerKey": ""},
    ),
    "allenai/cosmos_qa": (
        dict.fromkeys(("id", "context", "question", *(f"answer{i}" for i in range(4))), TEXT) | {"label": Value("int32")},
        {"id": "1", "context": "It rained.", "question": "Why?", "label": 1} | {f"answer{i}": f"for {i}" for i in range(4)},
        {"label": -1},
    ),
    "allenai/social_i_qa": (
        dict.fromkeys(("context", "question", "answerA", "answerB", "answerC", "label"), TEXT),
        {"context": "It rained.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "2"},
        None,
    ),
    "tatsu-lab/alpaca": (
        dict.fromkeys(("instruction", "input", "output", "text"), TEXT),
        {"instruction": "Say", "input": "", "output": "Yes.", "text": "Below is an instruction. Say Yes."},
        None,
    ),
    "sahil2801/CodeAlpaca-20k": (
        dict.fromkeys(("output", "instruction", "input"), TEXT),
        {"instruction": "Add two numbers", "input": "1, 2", "output": "Yes."},
        None,
    ),
    "gbharti/finance-alpaca": (
        dict.fromkeys(("text", "instruction", "input", "output"), TEXT),
        {"instruction": "What is a bond?", "input": "", "output": "Rest.", "text": ""},
        None,
    ),
    "medalpaca/medical_meadow_medical_flashcards": (
        dict.fromkeys(("input", "output", "instruction"), TEXT),
        {"instruction": "Answer this truthfully", "input": "What heals?", "output": "Rest."},
        None,
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_sets_of_questions_of_the_presets(tmp_path: Path, name: str) -> None:
    features, row, unlabelled = SETS[name]
    parts = {"train": [row] * 20}
    if unlabelled:
        parts |= {"validation": [row] * 5, "test": [row | unlabelled] * 3}
    hub = stand_in(tmp_path / "hub", features, parts)
    for source in ("questions", *(["text"] if "instruction" in features else [])):
        data = Data(source=source, public_hub=hub)
        sizes = {split: len(load_questions(data, "x", split, hub)) for split in ("train", "validation", "test")}
        # A part without labels is none: what was for validation tests.
        wanted = {"train": 18, "validation": 2, "test": 5} if unlabelled else {"train": 14, "validation": 2, "test": 4}
        assert sizes == wanted
        answer = load_questions(data, "x", "train", hub)[0]
        assert answer["choices"][answer["answer"]] in ("water", "for 1", "b", "Yes.", "Rest.")


def test_every_set_of_text_that_a_preset_names_has_a_stand_in() -> None:
    presets = [load_settings(name).data for name in preset_names()]
    named = {hub for data in presets if data.is_text for hub in (*data.hub, data.public_hub) if hub}
    assert named <= SETS.keys()


def png(value: int) -> dict:
    stream = io.BytesIO()
    PILImage.new("RGBA", (4, 4), (value, 0, 0, 0)).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def test_images_with_several_label_columns(tmp_path: Path) -> None:
    labels = {"fine_label": ClassLabel(names=["dog", "cat", "car"]), "coarse_label": ClassLabel(names=["pet", "thing"])}
    rows = [{"img": png(i), "fine_label": i % 3, "coarse_label": int(i % 3 == 2)} for i in range(20)]
    hub = stand_in(tmp_path / "hub", {"img": Image(), **labels}, {"train": rows, "test": rows[:5]})
    fine = load_images(Data(source="images", public_hub=hub), "x", "test", hub)
    assert fine.features["label"].names == ["dog", "cat", "car"]
    # Transparent, and so white, as everywhere.
    assert fine[0]["image"].getpixel((0, 0)) == (255, 255, 255)
    coarse = load_images(Data(source="images", public_hub=hub, label_column="coarse_label"), "x", "test", hub)
    assert coarse["label"] == [0, 0, 1, 0, 0]
    with pytest.raises(DataFormatError, match=r"data.label-column = 'kind'"):
        load_images(Data(source="images", public_hub=hub, label_column="kind"), "x", "test", hub)


def test_classes_that_are_texts_are_numbered_alike_in_all_parts(tmp_path: Path) -> None:
    rows = [{"image": png(i), "category": name} for i, name in enumerate(["lung", "heart", "lung"] * 4)]
    hub = stand_in(tmp_path / "hub", {"image": Image(), "category": TEXT}, {"train": rows, "test": rows[1:3]})
    data = Data(source="images", public_hub=hub, splits={"validation-fraction": 0.25})
    train = load_images(data, "x", "train", hub)
    assert (train.features["label"].names, len(train)) == (["heart", "lung"], 9)
    assert load_images(data, "x", "test", hub)["label"] == [0, 1]


def test_configurations_are_named_after_a_colon_and_revisions_after_an_at(tmp_path: Path) -> None:
    for configuration, count in (("easy", 3), ("hard", 4)):
        stand_in(
            tmp_path / "hub", SETS["tau/commonsense_qa"][0], {"train": [SETS["tau/commonsense_qa"][1]] * count}, configuration
        )
    front = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("easy", "hard"))
    (tmp_path / "hub" / "README.md").write_text(f"---\nconfigs:\n{front}---\n")
    assert len(load_from_hub(f"{tmp_path / 'hub'}:hard")["train"]) == 4
    assert hub_name("allenai/ai2_arc:ARC-Easy@210d026") == "allenai/ai2_arc"
    with pytest.raises(HubError, match=r"data.hub = "):
        load_from_hub(f"{tmp_path / 'hub'}:none")
