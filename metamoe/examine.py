"""What a file or a folder is taken for, before anybody trains on it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from metamoe.common.config import Data
from metamoe.common.data.conversations import TEXTS
from metamoe.common.data.folders import SUFFIXES, class_folders, part_folders
from metamoe.common.data.layouts import QUESTIONS, layout_of, mapped
from metamoe.common.data.pictures import IMAGE_COLUMNS, LABEL_COLUMNS, Found, find_pictures, pictures_at
from metamoe.common.data.questions import Read, dataset_of, text_files, text_survey
from metamoe.common.data.survey import Survey, survey
from metamoe.common.data.tables import read_rows, table_kind, tables_in
from metamoe.common.data.text import tokenised
from metamoe.common.errors import DataFormatError, InputFileError
from metamoe.common.model.seed import Seed
from metamoe.show import some

_PROMPTS = 3


@dataclass(frozen=True)
class Prompt:
    """A sample of text as a model sees it: what it goes on from, what it chooses among, and which is right."""

    prompt: str
    choices: list[str]
    answer: int


@dataclass(frozen=True)
class Examined:
    """What is at a path.

    Attributes:
        source: the ``data.source`` that it goes with.
        survey: what is there, what is wrong, and what is unusual.
        prompts: some samples, of text.
        pictures: all, of images.
    """

    source: str
    survey: Survey
    prompts: list[Prompt] = field(default_factory=list)
    pictures: Found | None = None


def examine(path: Path, data: Data, seed: Seed | None = None) -> Examined:
    """Read all that is at a path.

    Args:
        path: a folder as ``data.folder`` holds one for each domain, a folder with one for each class, or a file.
        data: settings of the data; where ``data.source`` is glyphs, what is found decides.
        seed: a decoder, whose tokenizer is to make the prompts; None for the text as it is.

    Raises:
        InputFileError: there is nothing that can be read.
        DataFormatError: it is not in any form that is known, or holds several sets.
    """
    if not path.exists():
        raise InputFileError(f"{path} is not there")
    if sets := _sets_in(path, data):
        raise DataFormatError(
            f"{path} is a folder of {len(sets)} sets ({some(sets)}), each with parts of its own; check one of them, as "
            f"{path / sets[0]}, or all as a run takes them: 'metamoe presets --check PRESET --data-dir {path}'"
        )
    source = _source(path, data) if data.source == "glyphs" else data.source
    chosen = data.model_copy(update={"source": source})
    if source == "images":
        divided = path.is_dir() and (tables_in(path) or part_folders(path, data.splits))
        found = find_pictures(path, chosen) if divided else _undivided(path, chosen)
        return Examined(source, survey(found, chosen), pictures=found)
    files = text_files(path, chosen) if path.is_dir() else {"train": [path]}
    looked, reads = text_survey(files, chosen)
    return Examined(source, looked, list(_prompts(reads, chosen, seed)))


def _undivided(path: Path, data: Data) -> Found:
    found = pictures_at(path, data)
    return replace(found, parts={"train" if path.is_dir() else "all": found.parts["test"]})


def _sets_in(path: Path, data: Data) -> list[str]:
    """Names of the folders in a folder that are sets themselves: their parts hold classes, or tables. Otherwise each would be
    taken for a class.
    """
    if not path.is_dir() or part_folders(path, data.splits) or tables_in(path):
        return []
    inside = {name: part_folders(folder, data.splits).values() for name, folder in class_folders(path).items()}
    return [name for name, parts in inside.items() if any(class_folders(part) or tables_in(part) for part in parts)]


def _source(path: Path, data: Data) -> str:
    """The kind of data that something looks like."""
    if path.is_dir():
        places = [path, *part_folders(path, data.splits).values()]
        if not (tables := tables_in(path)):
            if any(map(class_folders, places)):
                return "images"
            if loose := [file for file in path.glob("*") if file.suffix.lower() in SUFFIXES]:
                raise DataFormatError(
                    f"{path} has {len(loose)} pictures in no folder of a class; put them into folders such as "
                    f"{path / 'CLASS NAME'}, or beside a table of paths and labels, train.csv"
                )
            return "text"
        path = tables[0]
    if not table_kind(path):
        return "text"
    place, row = next(read_rows(path), (str(path), {}))
    if not row:
        raise InputFileError(f"{path} has no rows")
    images, labels = data.image_column or IMAGE_COLUMNS, data.label_column or LABEL_COLUMNS
    if any(name in row for name in _names(images)) and any(name in row for name in _names(labels)):
        return "images"
    return "questions" if layout_of(row, place, (*QUESTIONS, *TEXTS), mapped(data.columns)) not in TEXTS else "text"


def _names(given: str | tuple[str, ...]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else given


def _prompts(reads: Mapping[str, list[Read]], data: Data, seed: Seed | None) -> Iterator[Prompt]:
    samples = list(islice(chain.from_iterable(read.samples for there in reads.values() for read in there), _PROMPTS))
    shown: Any = dataset_of(Read([some[:1] for some in samples]), data)
    if seed is None:
        yield from (Prompt(row["prompt"], row["choices"], row["answer"]) for row in shown)
        return
    for question in tokenised(seed.tokenizer, data, shown):
        choices = [seed.tokenizer.decode(choice) for choice in question.choices]
        yield Prompt(seed.tokenizer.decode(question.prompt), choices, question.answer)
