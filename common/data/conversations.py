"""Text that is no question: instructions, conversations and documents, as what is given and what comes after it.

Each answer of a conversation is a sample of its own, with all that was said before it. A document is cut into blocks of as many
words; each but the first is what comes after the one before it. A document of a single block is cut in the middle.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from metamoe.common.config import Data
from metamoe.common.data.layouts import INSTRUCTIONS, Layout, layout_of, mapped, shown, value_of
from metamoe.common.data.rows import Question, question_of
from metamoe.common.errors import DataFormatError

_CONVERSATIONS = (
    Layout("conversations (messages)", "messages", "messages"),
    Layout("conversations (ShareGPT)", "conversations", "conversations"),
)
_DOCUMENTS = (Layout("documents", "text", "text"),)
TEXTS = (*_CONVERSATIONS, *INSTRUCTIONS, *_DOCUMENTS)

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatbot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_SAID = {"user": "User", "assistant": "Assistant", "system": "System"}
_WORD = re.compile(r"\S+")

Turn = dict[str, str]
"""``role`` (system, user or assistant) and ``content``."""


def texts_of(row: Mapping[str, Any], place: str, data: Data) -> tuple[str, list[Question]]:
    """What a row is taken for, and its samples: questions with one choice, and ``turns``, what was said before it; documents
    have none.

    Raises:
        DataFormatError: names the place, what is wrong, and the row.
    """
    layout = layout_of(row, place, TEXTS, mapped(data.columns))
    if layout in _CONVERSATIONS:
        return layout.name, _answers(_turns(row, layout.question, place))
    if layout in _DOCUMENTS:
        text = value_of(row, "text")
        if not isinstance(text, str):
            raise DataFormatError(f"{place}: text = {text!r} is not text. The row: {shown(row)}")
        return layout.name, blocks_of(text, data.block_words)
    question = question_of(row, layout, place, "where-needed")
    if question is None:
        return layout.name, []
    asked = question["prompt"].removesuffix("\nAnswer:")
    return layout.name, [question | {"turns": [{"role": "user", "content": asked}]}]


def blocks_of(text: str, words: int) -> list[Question]:
    """A document in blocks of ``words`` words, each with the one before it as its prompt."""
    starts = [match.start() for match in _WORD.finditer(text)]
    size = words if len(starts) > words else (len(starts) + 1) // 2
    if len(starts) < 2:
        return []
    cuts = [*starts[::size], len(text)]
    blocks = [text[start:end].strip() for start, end in pairwise(cuts)]
    return [{"prompt": before, "choices": [block], "answer": 0, "turns": []} for before, block in pairwise(blocks)]


def _turns(row: Mapping[str, Any], column: str, place: str) -> list[Turn]:
    messages = row[column]
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataFormatError(f"{place}: {column} is not a list of messages. The row: {shown(row)}")
    turns = []
    for message in messages:
        said = message if isinstance(message, Mapping) else {}
        role, content = said.get("role", said.get("from")), said.get("content", said.get("value"))
        if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
            content = "\n".join(str(part["text"]) for part in content)
        known = _ROLES.get(role.lower()) if isinstance(role, str) else None
        if known is None or not isinstance(content, str):
            raise DataFormatError(
                f"{place}: {column} has {shown(message)}; wanted is a role ({', '.join(_ROLES)}) with its content, a text"
            )
        turns.append({"role": known, "content": content})
    return turns


def _answers(turns: Sequence[Turn]) -> list[Question]:
    found = []
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant" and turn["content"].strip():
            before = list(turns[:number])
            lines = [*(f"{_SAID[said['role']]}: {said['content'].strip()}" for said in before), "Assistant:"]
            answer = turn["content"].strip()
            found.append({"prompt": "\n".join(lines), "choices": [answer], "answer": 0, "turns": before})
    return found
