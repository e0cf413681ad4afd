"""A client's own data: images by split and class, or questions by split, checked before anything is connected or trained.

DIR/train/CLASS NAME/*.png     private training images
DIR/test/CLASS NAME/*.png      images that the delivered model is evaluated on, here and nowhere else
DIR/validation/CLASS NAME/     only where settings ask for it

DIR/train.jsonl                private training questions, one JSON object a line; .jsonl.gz does as well
DIR/test.jsonl                 likewise
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from metamoe.common.config import ListChoices
from metamoe.common.data.images import classes_of_parts, image_dataset, image_files, readable
from metamoe.common.data.questions import read_questions
from metamoe.common.errors import DataFormatError, InputFileError, PrivateDataError

_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class FolderReport:
    """What is in a client's data folder: samples by split and class, or number of choices, and what is wrong."""

    counts: dict[str, dict[str, int]]
    wrong: list[str]


def check_questions(folder: Path) -> FolderReport:
    """Read every question of a data folder once.

    Raises:
        PrivateDataError: the folder lies in a Flower app, whose files are packed up and sent.
    """
    _check_place(folder)
    counts: dict[str, dict[str, int]] = {}
    wrong = []
    for split in _SPLITS:
        try:
            questions = read_question_folder(folder, split, "always")
            sizes = [f"{len(choices)} choices" for choices in questions["choices"]]
            counts[split] = {size: sizes.count(size) for size in sorted(set(sizes))}
        except PrivateDataError as error:
            if split != "validation":
                wrong.append(str(error))
    return FolderReport(counts, wrong)


def read_question_folder(folder: Path, split: str, list_choices: ListChoices) -> Dataset:
    """The questions of one split; columns, and ``list_choices``, as in :mod:`metamoe.common.data.questions`.

    Raises:
        PrivateDataError: as :func:`check_questions`; there is no file, or no question with a label in it; or a line is not a
            question.
    """
    _check_place(folder)
    file = next((file for file in (folder / f"{split}.jsonl", folder / f"{split}.jsonl.gz") if file.is_file()), None)
    if file is None:
        raise PrivateDataError(f"{folder} has no {split}.jsonl; put one question a line into it")
    try:
        questions = read_questions(file, list_choices)
    except (DataFormatError, InputFileError) as error:
        raise PrivateDataError(str(error)) from error
    if len(questions) == 0:
        raise PrivateDataError(f"{file} has no question with a label")
    return questions


def check_folder(folder: Path) -> FolderReport:
    """Open every image of a data folder once.

    Raises:
        PrivateDataError: there is no ``train`` with a class in it, ``test`` has a class that it has not, or the folder lies in
            a Flower app, whose files are packed up and sent.
    """
    _check_place(folder)
    names = _class_names(folder)
    counts: dict[str, dict[str, int]] = {}
    wrong = []
    for split in _SPLITS:
        if (folder / split).is_dir():
            counts[split] = dict.fromkeys(names, 0)
            for file, label in image_files(folder / split, names):
                if readable(file):
                    counts[split][names[label]] += 1
                else:
                    wrong.append(f"{file} is not an image that can be read")
    wrong += [f"{folder / split} has no images" for split in ("train", "test") if not sum(counts.get(split, {}).values())]
    return FolderReport(counts, wrong)


def read_folder(folder: Path, split: str) -> Dataset:
    """The images of one split, in the order of their paths, decoded when they are used.

    Columns: ``image`` (mode RGB) and ``label`` (index into the sorted names of the folders in ``train``).

    Raises:
        PrivateDataError: as :func:`check_folder`; the split is empty; or an image in it cannot be read.
    """
    _check_place(folder)
    names = _class_names(folder)
    files = image_files(folder / split, names)
    if not files:
        raise PrivateDataError(f"{folder / split} has no images; put them into one folder for each class")
    if bad := [file for file, _ in files if not readable(file)]:
        raise PrivateDataError(f"{bad[0]} is not an image that can be read ({len(bad)} of {len(files)}); remove or replace it")
    return image_dataset(files, names)


def _check_place(folder: Path) -> None:
    if not folder.is_dir():
        raise PrivateDataError(f"{folder} is not a folder")
    for parent in [folder.resolve(), *folder.resolve().parents]:
        project = parent / "pyproject.toml"
        if project.is_file() and _is_flower_app(project):
            raise PrivateDataError(
                f"{folder} lies in the Flower app {parent}: files there are packed into the app bundle and sent to every "
                "party; keep private data outside of it"
            )


def _is_flower_app(project: Path) -> bool:
    try:
        return "flwr" in tomllib.loads(project.read_text()).get("tool", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return False


def _class_names(folder: Path) -> list[str]:
    try:
        return classes_of_parts(folder)
    except (DataFormatError, InputFileError) as error:
        raise PrivateDataError(str(error)) from error
