"""What a folder is taken for."""

from pathlib import Path

import pytest
from PIL import Image

from metamoe.common.config import Data
from metamoe.common.errors import DataFormatError
from metamoe.examine import examine


def _picture(file: Path) -> None:
    file.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(file)


def test_a_folder_of_sets_is_not_taken_for_one_whose_classes_they_are(tmp_path: Path) -> None:
    for name in ("flags", "signs"):
        _picture(tmp_path / name / "train" / "CROSS" / "0.png")
    with pytest.raises(DataFormatError, match=r"a folder of 2 sets \(flags, signs\).*presets --check"):
        examine(tmp_path, Data())
    assert examine(tmp_path / "flags", Data()).survey.counts == {"train": {"CROSS": 1}}


def test_folders_within_a_class_are_of_it(tmp_path: Path) -> None:
    _picture(tmp_path / "CROSS" / "train" / "0.png")
    assert examine(tmp_path, Data()).survey.counts == {"train": {"CROSS": 1}}
