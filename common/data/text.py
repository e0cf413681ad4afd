"""Questions as tokens: a prompt, and its choices."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metamoe.common import config
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
    """A data set's questions; of a prompt that is too long the end is kept, of an answer the beginning."""
    return [
        Question(
            tokenizer(row["prompt"])["input_ids"][-data.prompt_tokens :],
            # A choice goes on after the prompt: by a space, and without what marks the beginning of a text.
            [tokenizer(" " + choice, add_special_tokens=False)["input_ids"][: data.answer_tokens] for choice in row["choices"]],
            row["answer"],
        )
        for row in dataset
    ]


def prompts(questions: Sequence[Question], rows: Tensor) -> Tokens:
    """The prompts of some questions alone, padded on the right."""
    chosen = [questions[row].prompt for row in rows.tolist()]
    longest = max(map(len, chosen))
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in chosen])
    real = torch.arange(longest) < torch.tensor([len(prompt) for prompt in chosen])[:, None]
    return prompt_tokens(ids, real)
