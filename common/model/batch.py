"""A batch on its way through a model: what goes in, and what is made of what comes out, as a loss or as scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from metamoe.common.compute import full_precision
from metamoe.common.model.inputs import Inputs, Tokens
from metamoe.common.model.seed import Seed

_TEXTS = 256


class Batch(Protocol):
    """Some samples on their way through a model: what goes in, and what is made of what :func:`encode` gives."""

    @property
    def inputs(self) -> Inputs: ...

    @property
    def count(self) -> int:
        """How many losses their mean is over."""
        ...

    def loss(self, model: Any, encoded: Tensor) -> Tensor:
        """The task's loss, a scalar."""
        ...

    def scores(self, model: Any, encoded: Tensor) -> Tensor:
        """Scores of every class or choice, float32 [B, C]."""
        ...


Scores = Callable[[Batch], Tensor]
"""A model as what scores a batch: [B, C]."""


@dataclass(frozen=True)
class ImageBatch:
    """Images [B, 3, H, W], their classes [B], and the classes' unit text features [C, p]."""

    inputs: Tensor
    labels: Tensor
    texts: Tensor

    @property
    def count(self) -> int:
        return len(self.labels)

    def loss(self, model: Any, encoded: Tensor) -> Tensor:
        """Cross-entropy of scaled cosine similarities."""
        return F.cross_entropy(self.scores(model, encoded), self.labels.to(encoded.device))

    def scores(self, model: Any, encoded: Tensor) -> Tensor:
        return class_logits(model, encoded, self.texts)


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


@dataclass(frozen=True)
class TextBatch:
    """Packed questions and the tokens that are to be predicted."""

    inputs: Tokens
    targets: Targets

    @property
    def count(self) -> int:
        return len(self.inputs.ids)

    def loss(self, model: Any, encoded: Tensor) -> Tensor:
        """Next-token loss: the mean over the tokens of each answer, as it is scored, and then over samples. So a proxy, whose
        answer is long, weighs no more than a question.
        """
        losses = F.cross_entropy(self._logits(model, encoded), self.targets.token.to(encoded.device), reduction="none")
        lengths = torch.bincount(self.targets.sample)
        with full_precision(encoded.device):
            return losses @ (1 / (lengths[self.targets.sample] * len(lengths))).to(encoded.device)

    def scores(self, model: Any, encoded: Tensor) -> Tensor:
        """Log-likelihood of each choice divided by its number of tokens; of one that a question has not, minus infinity."""
        likelihoods = self._logits(model, encoded).log_softmax(-1).gather(1, self.targets.token.to(encoded.device)[:, None])
        # Where each token's likelihood belongs is known here, whatever the device: nobody has to wait for it.
        width = int(self.targets.choice.max()) + 1
        place = self.targets.sample * width + self.targets.choice
        counts = torch.bincount(place, minlength=len(encoded) * width).to(encoded.device)
        sums = likelihoods.new_zeros(len(counts)).index_add(0, place.to(encoded.device), likelihoods.squeeze(1))
        return torch.where(counts > 0, sums / counts, -torch.inf).reshape(-1, width)

    def _logits(self, model: Any, encoded: Tensor) -> Tensor:
        targets = self.targets.to(encoded.device)
        return model.lm_head(encoded[targets.sample, targets.position]).float()


@torch.no_grad()
def text_features(seed: Seed, names: Sequence[str], prompt: str) -> Tensor:
    """Unit text features of class names, each put into ``prompt`` at ``{}``. float32 [C, p]."""
    features = []
    for start in range(0, len(names), _TEXTS):
        texts = [prompt.replace("{}", name) for name in names[start : start + _TEXTS]]
        tokens = seed.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        tokens = tokens.to(seed.model.device)
        found = seed.model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
        features.append(found.pooler_output.float())
    return F.normalize(torch.cat(features), dim=1)


def class_logits(model: Any, pooled: Tensor, texts: Tensor) -> Tensor:
    """CLIP's scaled cosine similarities of pooled image features [B, d] and unit text features [C, p]. float32 [B, C]."""
    images = F.normalize(model.visual_projection(pooled).float(), dim=1)
    # Scaled by some 100, what is rounded to 8 bits would be off by half.
    with full_precision(images.device):
        return model.logit_scale.exp() * images @ texts.to(images.device).T


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
