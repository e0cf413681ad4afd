"""The forms in which sets of questions and instructions are published: which column is what."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from metamoe.common.config import AnswerIs, Columns
from metamoe.common.errors import DataFormatError

_SHOWN = 240
_HOW = (
    'say by data.columns which is what: --set data.columns.question=NAME --set \'data.columns.choices=["NAME", "NAME"]\' --set '
    "data.columns.answer=NAME"
)


@dataclass(frozen=True)
class Layout:
    """Which column is what; a dot leads into a column that holds others ("choices.text").

    Attributes:
        name: the sets that have it.
        question: what is asked.
        answer: which choice is right; without choices, what is answered.
        choices: one column with all of them, or one for each.
        context: what comes before the question, if the row has it.
        after: what comes after an instruction, if the row has it.
        labels: the choices' own names, by which the answer may go.
        fixed: choices that are in no column.
        wrong: the columns of wrong choices, where ``answer`` is the text of the right one.
        answer_is: how the answer says which choice it is; None if the row shows it; counted: by numbers from 0 or from 1, which
            the whole set shows.
        moved: the right choice has the same place in every row, and gets another one.
    """

    name: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    context: str = ""
    after: str = ""
    labels: str = ""
    fixed: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    answer_is: AnswerIs | Literal["counted"] | None = None
    moved: bool = False

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns without which it is another layout."""
        return tuple(filter(None, (self.question, *self.choices, *self.wrong, self.labels, self.answer)))


def _numbered(name: str, *numbers: str) -> tuple[str, ...]:
    return tuple(f"{name}{number}" for number in numbers)


QUESTIONS = (
    Layout("CosmosQA", "question", "label", _numbered("answer", *"0123"), "context", answer_is="index"),
    Layout("SocialIQA", "question", "label", _numbered("answer", *"ABC"), "context", answer_is="one-based"),
    Layout("MedMCQA", "question", "cop", _numbered("op", *"abcd"), answer_is="counted"),
    Layout("SciQ", "question", "correct_answer", wrong=_numbered("distractor", *"123"), context="support"),
    Layout("PIQA", "goal", "label", _numbered("sol", *"12"), answer_is="index"),
    Layout("WinoGrande", "sentence", "answer", _numbered("option", *"12"), answer_is="one-based"),
    Layout("HellaSwag", "ctx", "label", ("endings",), answer_is="index"),
    Layout("OpenBookQA", "question_stem", "answerKey", ("choices.text",), labels="choices.label"),
    Layout("ARC, CommonsenseQA", "question", "answerKey", ("choices.text",), "context", labels="choices.label"),
    Layout("ARC, CommonsenseQA, OpenBookQA, as files", "question.stem", "answerKey", ("question.choices",)),
    Layout("TruthfulQA", "question", "mc1_targets.labels", ("mc1_targets.choices",), moved=True),
    Layout("TruthfulQA, generation", "question", "best_answer", wrong=("incorrect_answers",)),
    Layout("RACE", "question", "answer", ("options",), "article", answer_is="letter"),
    Layout("MMLU-Pro", "question", "answer_index", ("options",), answer_is="index"),
    Layout("MedQA", "question", "answer_idx", ("options",)),
    Layout("BoolQ", "question", "answer", fixed=("no", "yes"), context="passage", answer_is="boolean"),
    Layout("BoolQ of SuperGLUE", "question", "label", fixed=("no", "yes"), context="passage", answer_is="boolean"),
    Layout("MMLU", "question", "answer", ("choices",), "context"),
)
"""Of two that fit, the earlier is meant."""

INSTRUCTIONS = (
    Layout("Alpaca", "instruction", "output", after="input"),
    Layout("Dolly", "instruction", "response", context="context"),
    Layout("prompt and completion", "prompt", "completion"),
    Layout("prompt and response", "prompt", "response"),
)
# A passage is what tells a question by yes and no from others.
_CONTEXT_NEEDED = ("BoolQ", "BoolQ of SuperGLUE", "RACE")


def mapped(columns: Columns) -> Layout | None:
    """The layout that settings give; None if they give none."""
    if not columns.question:
        return None
    answer_is = None if columns.answer_is == "auto" else columns.answer_is
    fixed = ("no", "yes") if columns.answer_is == "boolean" and not columns.choices else ()
    return Layout(
        *("data.columns", columns.question, columns.answer, columns.choices, columns.context),
        labels=columns.labels,
        fixed=fixed,
        answer_is=answer_is,
    )


def layout_of(row: Mapping[str, Any], place: str, known: tuple[Layout, ...], own: Layout | None = None) -> Layout:
    """The layout of a row: the one that settings give if it has its question, or else one of those known.

    Raises:
        DataFormatError: names the columns that are missing for the layout that is nearest, and shows the row.
    """
    if own and has(row, own.question):
        return _complete(row, own, place)
    for layout in known:
        if not _missing(row, layout):
            return layout
    nearest = max(known, key=lambda layout: _likeness(row, layout))
    if _likeness(row, nearest)[0] > 0:
        return _complete(row, nearest, place)
    asked = f"data.columns.question = {own.question!r} is none of them; " if own else ""
    raise DataFormatError(
        f"{place} has the columns {sorted(map(str, row))}; {asked}known are the layouts of "
        f"{', '.join(dict.fromkeys(k.name for k in known))}; {_HOW}. The row: {shown(row)}"
    )


def has(row: Any, path: str) -> bool:
    """Whether a row has a column."""
    for part in path.split("."):
        if not isinstance(row, Mapping) or part not in row:
            return False
        row = row[part]
    return True


def value_of(row: Any, path: str) -> Any:
    """What a row has in a column; None if it has none."""
    if not path or not has(row, path):
        return None
    for part in path.split("."):
        row = row[part]
    return row


def shown(row: Any) -> str:
    """A row as a person may look at it, not all of it if it is long."""
    text = repr(row)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _complete(row: Mapping[str, Any], layout: Layout, place: str) -> Layout:
    if missing := _missing(row, layout):
        raise DataFormatError(
            f"{place} looks like {layout.name} and lacks the column {' and '.join(map(repr, missing))}; it has "
            f"{sorted(map(str, row))}; {_HOW}. The row: {shown(row)}"
        )
    return layout


def _missing(row: Mapping[str, Any], layout: Layout) -> list[str]:
    needed = (*layout.needed, layout.context) if layout.name in _CONTEXT_NEEDED else layout.needed
    return [path for path in needed if not has(row, path)]


def _likeness(row: Mapping[str, Any], layout: Layout) -> tuple[int, int]:
    """How many of a layout's own columns a row has, and, less, how many it lacks."""
    missing = len(_missing(row, layout))
    return len(layout.needed) - missing, -missing
