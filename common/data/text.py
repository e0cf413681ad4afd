"""Questions as tokens: prompts with their choices, packed so that one pass scores them all."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from metamoe.common import config
from metamoe.common.model.inputs import Tokens, prompt_tokens

# Few, as all are padded to the longest.
_BATCH = 4


@dataclass(frozen=True)
class Question:
    """A question as token ids: the prompt, every choice, and which one is right."""

    prompt: list[int]
    choices: list[list[int]]
    answer: int


@dataclass(frozen=True)
class Targets:
    """What is to be predicted where: for each token of each choice its sample, its choice, the position in the packed sequence
    that predicts it, and the token. int64 [M] each.
    """

    sample: Tensor
    choice: Tensor
    position: Tensor
    token: Tensor

    def to(self, device: torch.device) -> "Targets":
        return Targets(*(tensor.to(device) for tensor in (self.sample, self.choice, self.position, self.token)))


def tokenised(tokenizer: Any, data: config.Data, dataset: Dataset) -> list[Question]:
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


def prompt_batches(questions: Sequence[Question]) -> Iterator[Tokens]:
    """The prompts alone, in order, padded on the right."""
    for start in range(0, len(questions), _BATCH):
        prompts = [question.prompt for question in questions[start : start + _BATCH]]
        longest = max(map(len, prompts))
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
        real = torch.arange(longest) < torch.tensor([len(prompt) for prompt in prompts])[:, None]
        yield prompt_tokens(ids, real)


def packed(rows: Sequence[tuple[list[int], list[list[int]]]]) -> tuple[Tokens, Targets]:
    """Prompts, each followed by its continuations, of which every one sees the prompt and itself alone.

    A prompt is computed once, whatever the number of continuations. A continuation's last token predicts nothing, so it is not
    among the inputs.

    Args:
        rows: token ids of each prompt and of its continuations.
    """
    lengths = [len(prompt) + sum(len(choice) - 1 for choice in choices) for prompt, choices in rows]
    shape = (len(rows), max(lengths))
    ids, positions, prompt_mask = (torch.zeros(shape, dtype=kind) for kind in (torch.long, torch.long, torch.bool))
    # Which text of its row each token belongs to: 0 is the prompt, -1 padding.
    part = torch.full(shape, -1)
    targets: list[tuple[int, int, int, int]] = []
    for row, (prompt, choices) in enumerate(rows):
        end = len(prompt)
        ids[row, :end] = torch.tensor(prompt)
        positions[row, :end] = torch.arange(end)
        prompt_mask[row, :end], part[row, :end] = True, 0
        start = end
        for number, choice in enumerate(choices):
            inputs = choice[:-1]
            stop = start + len(inputs)
            ids[row, start:stop] = torch.tensor(inputs, dtype=torch.long)
            positions[row, start:stop] = torch.arange(end, end + len(inputs))
            part[row, start:stop] = number + 1
            targets += [
                (row, number, place, token) for place, token in zip([end - 1, *range(start, stop)], choice, strict=True)
            ]
            start = stop
    order = torch.arange(shape[1])
    same = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)
    visible = same & (order[None, :] <= order[:, None]) & (part[:, None, :] >= 0)
    visible |= torch.eye(shape[1], dtype=torch.bool)
    return Tokens(ids, positions, visible, prompt_mask), Targets(*torch.tensor(targets).T)
