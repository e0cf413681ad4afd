"""A client's own data: images by split and class, or questions by split, checked before anything is connected or trained.

DIR/train/CLASS NAME/*.png     private training images
DIR/test/CLASS NAME/*.png      images that the delivered model is evaluated on, here and nowhere else
DIR/validation/CLASS NAME/     only where settings ask for it

DIR/train.csv, DIR/test.csv    in place of folders: tables of paths and labels (.csv, .tsv, .json, .jsonl, .parquet)

DIR/train.jsonl                private training questions, instructions or conversations, one JSON object a line; .json, .csv
                               and .parquet do as well
DIR/test.jsonl                 likewise
"""

import tomllib
from dataclasses import replace
from pathlib import Path

from datasets import Dataset

from metamoe.common.config import Data
from metamoe.common.data.images import image_dataset
from metamoe.common.data.pictures import Found, find_pictures
from metamoe.common.data.questions import Read, dataset_of, read_text, text_files, text_survey
from metamoe.common.data.survey import Survey, survey
from metamoe.common.errors import DataFormatError, InputFileError, PrivateDataError
from metamoe.common.files import made_once

_NEEDED = (("train", "train on"), ("test", "test on"))


def check_questions(folder: Path, data: Data) -> Survey:
    """Read every question, or other text, of a data folder once.

    Raises:
        PrivateDataError: the folder lies in a Flower app, whose files are packed up and sent; it has no files; or a row in them
            is not in a known layout.
    """
    files = _text_files(folder, data)
    try:
        found, _ = text_survey(files, data)
    except (DataFormatError, InputFileError) as error:
        raise PrivateDataError(str(error)) from error
    return replace(
        found, wrong=[f"{folder} has no {part} part, such as {part}.jsonl" for part, _ in _NEEDED if part not in files]
    )


def read_question_folder(folder: Path, split: str, data: Data) -> Dataset:
    """The questions of one split; columns as in :mod:`metamoe.common.data.questions`.

    Raises:
        PrivateDataError: as :func:`check_questions`; there is no file, or no question with a label in it; or a row is not a
            question.
    """
    files = _text_files(folder, data).get(split)
    if not files:
        raise PrivateDataError(f"{folder} has no {split}.jsonl; put one question a line into it")
    try:
        samples = [samples for file in files for samples in read_text(file, data).samples]
    except (DataFormatError, InputFileError) as error:
        raise PrivateDataError(str(error)) from error
    if not samples:
        raise PrivateDataError(f"{files[0]} has no question with a label")
    return dataset_of(Read(samples), data)


def check_folder(folder: Path, data: Data) -> Survey:
    """Open every image of a data folder once.

    Raises:
        PrivateDataError: there is nothing to train on, the classes are not clear, or the folder lies in a Flower app, whose
            files are packed up and sent.
    """
    found = survey(_found(folder, data), data)
    return replace(
        found, wrong=found.wrong + [f"{folder} has no images to {use}" for part, use in _NEEDED if not found.counts.get(part)]
    )


def read_folder(folder: Path, split: str, data: Data) -> Dataset:
    """The images of one split, in the order of their paths or of a table, decoded when they are used.

    Columns: ``image`` (mode RGB) and ``label`` (index into the sorted names of the classes that are trained).

    Raises:
        PrivateDataError: as :func:`check_folder`; the split is empty; or an image in it cannot be read.
    """
    found = _found(folder, data)
    pictures = found.parts.get(split)
    if not pictures:
        raise PrivateDataError(f"{folder} has no images for {split}; put them into {folder / split}, a folder for each class")

    def looked_at() -> str:
        if bad := survey(replace(found, parts={split: pictures}, ignored={}), data).wrong:
            raise PrivateDataError(f"{bad[0]} ({len(bad)} of {len(pictures)} cannot be read); remove or replace it")
        return ""

    # Every stage reads them; who looked once need not decode all of them again.
    files = [picture for picture, _ in pictures if isinstance(picture, str)]
    if len(files) == len(pictures):
        made_once("looked-at", [data.background], files, looked_at)
    else:
        looked_at()
    return image_dataset(pictures, found.names, data.background)


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


def _text_files(folder: Path, data: Data) -> dict[str, list[Path]]:
    _check_place(folder)
    try:
        return text_files(folder, data)
    except (DataFormatError, InputFileError) as error:
        raise PrivateDataError(str(error)) from error


def _found(folder: Path, data: Data) -> Found:
    _check_place(folder)
    try:
        return find_pictures(folder, data)
    except (DataFormatError, InputFileError) as error:
        raise PrivateDataError(str(error)) from error
