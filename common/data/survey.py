"""A look at every picture of a set before anything is trained: how many, what cannot be read, and what is unusual."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from metamoe.common.config import Data
from metamoe.common.data.decode import look_at
from metamoe.common.data.pictures import Found, Pictures
from metamoe.common.errors import InputFileError


@dataclass(frozen=True)
class Survey:
    """What is in a set.

    Attributes:
        counts: samples by part, and by class or form.
        wrong: what stands in the way of using it, in words.
        unreadable: the files that cannot be read; why is among what is wrong.
        unusual: what a person should know of, each with the files of which it is true; they are used all the same, but for what
            is said to be ignored.
    """

    counts: dict[str, dict[str, int]]
    wrong: list[str]
    unreadable: list[str] = field(default_factory=list)
    unusual: dict[str, list[str]] = field(default_factory=dict)


def survey(found: Found, data: Data) -> Survey:
    """Decode every picture of a set once; the same picture in several places is found by its pixels."""
    counts = {part: dict.fromkeys(found.names, 0) for part in found.parts}
    wrong, unreadable = [], []
    unusual: dict[str, list[str]] = defaultdict(list)
    seen: dict[str, tuple[str, str, int]] = {}
    for part, place, image, label in named_pictures(found):
        try:
            looked = look_at(Path(image) if isinstance(image, str) else BytesIO(image["bytes"]), data.background, place)
        except InputFileError as error:
            wrong.append(str(error))
            unreadable.append(place)
            continue
        counts[part][found.names[label]] += 1
        for kind in looked.unusual:
            unusual[kind].append(place)
        first, other, its_label = seen.setdefault(looked.digest, (place, part, label))
        if first != place and its_label != label:
            unusual["the same picture in two classes"].append(f"{first} and {place}")
        elif first != place and other != part:
            unusual[f"the same picture in {other} and {part}"].append(f"{first} and {place}")
        elif first != place:
            unusual["the same picture twice"].append(f"{first} and {place}")
    for kind, files in found.ignored.items():
        unusual[f"ignored, {kind}"] += [str(file) for file in files]
    return Survey(counts, wrong, unreadable, dict(unusual))


def named_pictures(found: Found) -> Iterator[tuple[str, str, Pictures, int]]:
    """Part, name, picture and class of all pictures of a set."""
    for part, pictures in found.parts.items():
        for number, (image, label) in enumerate(pictures):
            yield part, image if isinstance(image, str) else f"{part}, picture {number}", image, label
