"""Whether inputs are like what any client has: those that are near to none tell that one is missing."""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from metamoe.ask import prompt_ids
from metamoe.common.config import Data, Router
from metamoe.common.data.decode import read_picture
from metamoe.common.data.folders import SUFFIXES
from metamoe.common.data.pixels import pixel_values
from metamoe.common.data.questions import read_questions
from metamoe.common.data.text import prompts, tokenised
from metamoe.common.errors import InputFileError, InvalidSettingError
from metamoe.common.model.artifact import Loaded
from metamoe.common.model.inputs import Inputs, Tokens, masked_mean, prompt_tokens
from metamoe.server.unify import FISHER_ODDS

_AT_ONCE = 32
_SHOWN = 10


@dataclass(frozen=True)
class Drift:
    """Of a stream of inputs, how many are like what a client has.

    Attributes:
        count: of inputs.
        near: by expert the inputs that are nearest to it.
        none: those that are near to none.
        examples: of these the ten that are farthest, each with the probability that it is no client's.
    """

    count: int
    near: dict[str, int]
    none: int
    examples: list[tuple[str, float]]

    @property
    def percent(self) -> float:
        """Share of inputs that are near to no client, %."""
        return 100.0 * self.none / self.count


@torch.inference_mode()
def drift_on(loaded: Loaded, path: Path) -> Drift:
    """How many inputs are near to no client, by the Gaussians that route.

    A router of Fisher rows or shapes has log p_k(x) of every client k and log p_0(x) of the public set, up to what they share.
    An input counts as near to none where it is rather a public sample than a client's, at even odds of one or the other, and
    among clients:

        log p_0(x) > log((1 / K) sum_k p_k(x)),

    whatever odds routing gives the seed (``router.seed-log-odds``); where it gives those at which 98 of 100 public samples stay
    with it (``auto``, with shapes), by these. It is decided where the lowest layer decides, a token at a
    time, and averaged over an image's tokens or those of a prompt.

    Args:
        loaded: the model.
        path: for a model of images a folder with pictures in it, at any depth, or one of them; for one of text a file of
            questions or text (docs/data.md), or ``.txt`` with a prompt a line.

    Raises:
        InputFileError: there is nothing there that the model takes.
        DataFormatError: a row is in no layout that is known.
        InvalidSettingError: the model's router has no Gaussians, or none of the public set.
    """
    manifest = loaded.manifest
    if not manifest.router.seed_expert or manifest.router.rows != "fisher":
        raise InvalidSettingError(
            f"router.seed-expert = {str(manifest.router.seed_expert).lower()} with router.rows = {manifest.router.rows}: this "
            "model's router cannot tell a client's inputs from public ones; it takes seed-expert = true and rows = fisher"
        )
    near, farthest, count = dict.fromkeys(manifest.experts, 0), list[tuple[float, str]](), 0
    with loaded.seed.place.computing():
        for names, inputs in _inputs(loaded, path):
            _, decisions = loaded.model(inputs)
            foreign, nearest = nearness(decisions[0], prior_odds(manifest.router), inputs)
            for name, probability, expert in zip(names, foreign.tolist(), nearest.tolist(), strict=True):
                count += 1
                if probability <= 0.5:
                    near[manifest.experts[expert]] += 1
                else:
                    heapq.heappush(farthest, (probability, name))
    if not count:
        raise InputFileError(f"{path} holds nothing to look at")
    examples = [(name, probability) for probability, name in heapq.nlargest(_SHOWN, farthest)]
    return Drift(count, near, len(farthest), examples)


def prior_odds(router: Router) -> float:
    """What is taken off the seed's score, so that odds are even."""
    if router.seed_log_odds != "auto":
        return router.seed_log_odds
    return 0.0 if router.statistics == "shape" else FISHER_ODDS


def nearness(decision: Tensor, seed_log_odds: float, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The probability that inputs are no client's, and the client to which each is nearest.

    Args:
        decision: log pi [B, T, K + 1], the seed last.
        seed_log_odds: what the seed's score has been given beside its Gaussian's.
        inputs: of which it is.

    Returns:
        float32 [B] from 0 to 1, and int64 [B].
    """
    clients, public = decision[..., :-1], decision[..., -1] - seed_log_odds
    foreign = torch.sigmoid(public - (clients.logsumexp(-1) - math.log(clients.shape[-1])))
    mask = inputs.prompt.to(decision.device) if isinstance(inputs, Tokens) and decision.shape[1] > 1 else None
    found = masked_mean(torch.cat([foreign.unsqueeze(-1), clients.exp()], dim=-1), mask)
    return found[:, 0], found[:, 1:].argmax(-1)


def _inputs(loaded: Loaded, path: Path) -> Iterator[tuple[list[str], Inputs]]:
    """Names and inputs, some at a time."""
    if loaded.seed.is_image_model:
        files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES)
        for start in range(0, len(files), _AT_ONCE):
            part = files[start : start + _AT_ONCE]
            pictures = [read_picture(file, loaded.manifest.background) for file in part]
            yield [str(file) for file in part], pixel_values(loaded.seed, pictures)
        return
    yield from prompts_in(loaded, path)


def prompts_in(loaded: Loaded, path: Path) -> Iterator[tuple[list[str], Tokens]]:
    """Texts of prompts, and their tokens, some at a time.

    Raises:
        InputFileError: there is no such file, or it is not UTF-8.
        DataFormatError: a row is in no layout that is known.
    """
    manifest, tokenizer = loaded.manifest, loaded.seed.tokenizer
    if path.suffix.lower() == ".txt" and not manifest.text:
        try:
            lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputFileError(f"{path} cannot be read as UTF-8: {error}") from error
        for line in lines:
            ids = torch.tensor([prompt_ids(loaded, line)[-manifest.prompt_tokens :]])
            yield [line], prompt_tokens(ids, torch.ones_like(ids, dtype=torch.bool))
        return
    source = "text" if manifest.text else "questions"
    data = Data(
        source=source,
        list_choices=manifest.list_choices,
        block_words=manifest.block_words,
        prompt_tokens=manifest.prompt_tokens,
        answer_tokens=manifest.answer_tokens,
    )
    samples = read_questions(path, data)
    questions = tokenised(tokenizer, data, samples)
    for start in range(0, len(samples), _AT_ONCE):
        rows = torch.arange(start, min(start + _AT_ONCE, len(samples)))
        yield [samples[row]["prompt"] for row in rows.tolist()], prompts(questions, rows)
