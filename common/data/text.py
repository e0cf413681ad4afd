"""Questions as tokens: a prompt, and its choices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from metamoe.common import config
from metamoe.common.errors import DataFormatError
from metamoe.common.model.inputs import Tokens, prompt_tokens

if TYPE_CHECKING:
    from datasets import Dataset

# Few, as all are padded to the longest.
AT_ONCE = 4


@dataclass(frozen=True)
class Question:
    """A question as token ids: the prompt, every choice, and which one is right."""

    prompt: list[int]
    choices: list[list[int]]
    answer: int


def tokenised(tokenizer: Any, data: config.Data, dataset: "Dataset") -> list[Question]:
    """A data set's questions; of a prompt that is too long the end is kept, of an answer the beginning.

    Raises:
        DataFormatError: the tokenizer makes no token of a prompt or a choice.
    """
    questions = []
    for row in dataset:
        turns = row.get("turns")
        chat = bool(turns and getattr(tokenizer, "chat_template", None))
        prompt = chat_ids(tokenizer, turns) if chat else tokenizer(row["prompt"])["input_ids"]
        # A choice goes on after the prompt: by a space, where no template has put anything, and without what marks the
        # beginning of a text.
        choices = [choice if chat else f" {choice}" for choice in row["choices"]]
        ids = [tokenizer(choice, add_special_tokens=False)["input_ids"][: data.answer_tokens] for choice in choices]
        if unread := [text for text, tokens in zip([row["prompt"], *choices], [prompt, *ids], strict=True) if not tokens]:
            raise DataFormatError(f"the seed's tokenizer makes no token of {unread[0]!r}; is it the seed's own?")
        questions.append(Question(prompt[-data.prompt_tokens :], ids, row["answer"]))
    return questions


def chat_ids(tokenizer: Any, turns: Sequence[Mapping[str, str]]) -> list[int]:
    """What was said as the tokenizer's chat template has it, up to where the answer begins.

    Raises:
        DataFormatError: the template has no place for it, such as two turns of a user in a row.
    """
    try:
        ids: list[int] = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataFormatError(f"the seed's chat template refuses a conversation of the roles {roles}: {error}") from error
    return ids


def prompts(questions: Sequence[Question], rows: Tensor) -> Tokens:
    """The prompts of some questions alone, padded on the right."""
    chosen = [questions[row].prompt for row in rows.tolist()]
    longest = max(map(len, chosen))
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in chosen])
    real = torch.arange(longest) < torch.tensor([len(prompt) for prompt in chosen])[:, None]
    return prompt_tokens(ids, real)
