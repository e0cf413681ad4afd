"""Attacks on a simulation's own run: what a server that keeps to the protocol could learn from what arrived.

They need the private data to know how well they did, so they run where that is: on a simulation's folder.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, concatenate_datasets
from scipy.stats import multivariate_normal, norm
from sklearn.metrics import roc_auc_score

from metamoe.client.dp_sgd import train_with_privacy
from metamoe.client.expert import expert_samples, train_expert
from metamoe.client.profile import client_evidence, profile
from metamoe.client.site import Site
from metamoe.common.compute import ON_CPU, derived_seed, threads
from metamoe.common.config import Settings
from metamoe.common.curve import unwatched
from metamoe.common.data.datasets import label_space, load_private, load_public, no_progress_bars
from metamoe.common.data.pixels import all_pixels, batches
from metamoe.common.data.tasks import class_names, features, labels_in
from metamoe.common.errors import InputFileError
from metamoe.common.files import read_json
from metamoe.common.gaussian import coordinate_rows, coordinates, shape_rank, unpacked_shape
from metamoe.common.model.batch import class_logits, text_features
from metamoe.common.model.inputs import embed
from metamoe.common.model.lora import Expert, with_lora
from metamoe.common.model.seed import Seed, seed_at
from metamoe.common.model.vectors import all_evidence_paths, routing_vectors
from metamoe.common.presets import load_settings
from metamoe.common.privacy import expert_mechanism
from metamoe.common.wire import reply_artifacts
from metamoe.server.experts import stored_expert

_ATTACK = 23
_GUESSES = 1_000


@dataclass(frozen=True)
class ClientAttack:
    """What attacks on one client came to.

    Attributes:
        mean_error: distance of the private mean as it was sent from the true one, over the true one's distance from the public
            mean. None if no mean was sent.
        guessed_error: distance of the private mean as :func:`recovered_mean` has it from the true one, over the proxies' mean's
            distance from the true one: the median over guesses of N between a third and three times the true one. None if no
            routing vectors were sent that hold both.
        class_mix: correlation of the proxies' classes, as the seed sees them, with the private classes. None if all private
            classes are equally many.
        top_class: whether the largest private class is the largest among the proxies too.
        loss_auc: area under the curve of telling training from test samples by the expert's loss; 0.5 is guessing.
        lira_auc, lira_tpr: the same by the likelihood ratio attack (Carlini et al. 2022), and the share of training samples
            found when one in a hundred others is taken for one. None without shadow experts.
        shape_auc: area under the curve of telling training from test samples by their likelihood under the Gaussian of mean and
            shape. None if no shape was sent.
        shape_cosine, shape_cosine_others: how near the shape's principal directions come to single samples: of a sample's
            deviation from the mean, the largest absolute cosine with any, the median over training and over test samples.
    """

    mean_error: float | None
    guessed_error: float | None
    class_mix: float | None
    top_class: bool
    loss_auc: float
    lira_auc: float | None
    lira_tpr: float | None
    shape_auc: float | None = None
    shape_cosine: float | None = None
    shape_cosine_others: float | None = None


def attack(
    run: Path, shadows: int, progress: Callable[[int, int], None], clients: Sequence[str] = ()
) -> dict[str, ClientAttack]:
    """Attack clients of a finished simulation.

    Args:
        run: its folder.
        shadows: shadow experts for each client, each trained on half of what might have been trained on; zero for none.
        progress: called with experts looked at and in all: each client's own, and its shadows.
        clients: their names; none for all.

    Raises:
        InputFileError: the folder holds no finished simulation, or it had no such client.
    """
    try:
        settings = load_settings(str(run / "settings.toml"))
        picks = read_json(run / "proxies.json")["clients"]
        experts = {name: stored_expert(run / "server" / "experts" / name) for name in settings.member_names}
    except (OSError, KeyError, ValueError) as error:
        raise InputFileError(f"{run} is not the folder of a finished simulation: {error}") from error
    if settings.data.private == "own":
        raise InputFileError(f"{run} is a run on the clients' own data, which is not here to compare with")
    names = settings.member_names
    if unknown := [name for name in clients if name not in names]:
        raise InputFileError(f"{run} is a run without a client {unknown[0]!r}; it has {', '.join(names)}")
    seed, public = seed_at(settings.seed_model, ON_CPU), load_public(settings.data)
    chosen = [(client, name) for client, name in zip(settings.members, names, strict=True) if name in (clients or names)]
    results = {}
    with threads(settings.compute.server_threads):
        for number, (client, name) in enumerate(chosen):
            proxies = public.select(picks[name]["ids"])
            done = partial(_shifted, progress, number * (shadows + 1), len(chosen) * (shadows + 1))
            done(0, shadows)
            private, (expert, vectors) = load_private(settings, client, "train"), experts[name]
            held = load_private(settings, client, settings.data.evaluate_on)
            mix, top = class_mix(seed, settings, private, proxies)
            losses = [confidence(seed, settings, expert, data, private, public) for data in (private, held)]
            lira = likelihood_ratio(seed, settings, client, expert, private, held, proxies, public, shadows, done)
            results[name] = ClientAttack(
                mean_error(seed, settings, client, private, public),
                guessed_error(seed, settings, client, expert, vectors, private, proxies),
                mix,
                top,
                _auc(*losses),
                _auc(*lira) if lira else None,
                _rate_at(*lira) if lira else None,
                *(shape_attack(seed, settings, client, private, held, public) or ()),
            )
            done(shadows + 1, shadows)
    return results


def as_json(settings: Settings, results: dict[str, ClientAttack]) -> dict[str, object]:
    """The results with the privacy they were got under."""
    return {"privacy": settings.privacy.model_dump(), "clients": {name: asdict(result) for name, result in results.items()}}


def mean_error(seed: Seed, settings: Settings, client: int, private: Dataset, public: Dataset) -> float | None:
    """See :class:`ClientAttack`; for the first mean of stage 1."""
    name = next(
        (a.name for a in reply_artifacts("profile", settings, seed) if a.name in ("seed-routing-vector", "seed-ffn-inputs")),
        None,
    )
    if name is None:
        return None
    exact = settings.model_copy(update={"privacy": settings.privacy.model_copy(update={"vectors": "none"})})
    sent, true = (_profile(seed, of, client, private, public)[name] for of in (settings, exact))
    some = public.select(range(0, len(public), max(1, len(public) // 1_000)))
    middle = _profile(seed, exact, client, some, public)[name]
    return float(np.linalg.norm(sent - true) / np.linalg.norm(true - middle))


def guessed_error(
    seed: Seed, settings: Settings, client: int, expert: Expert, vectors: np.ndarray | None, private: Dataset, proxies: Dataset
) -> float | None:
    """See :class:`ClientAttack`. The server has the proxies and the expert, and so the proxies' mean in it."""
    if vectors is None or settings.expert_training.samples != "aligned":
        return None
    model, paths = with_lora(seed, settings.lora, expert), all_evidence_paths(seed, settings.lora, settings.router)
    own, known = (routing_vectors(features(seed, model, paths, settings.data, data)) for data in (private, proxies))
    rng = np.random.default_rng(derived_seed(settings.seed, _ATTACK, client))
    guesses = len(private) * 3.0 ** rng.uniform(-1, 1, size=_GUESSES)
    return float(np.median(guess_errors(vectors, known, own, len(proxies) / guesses)))


def recovered_mean(vectors: np.ndarray, proxy_mean: np.ndarray, ratio: float) -> np.ndarray:
    """mu_priv = e + (e - mu_proxy) m / N: the routing vectors e = N/(N+m) mu_priv + m/(N+m) mu_proxy (Jiang et al. 2026, Eq. 8)
    solved for what they are to hide.

    Args:
        vectors: e, [L, d].
        proxy_mean: [L, d].
        ratio: m / N, with m known and N guessed.
    """
    return vectors + (vectors.astype(np.float64) - proxy_mean) * ratio


def guess_errors(vectors: np.ndarray, proxy_mean: np.ndarray, private_mean: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """For each guess of m / N the distance of :func:`recovered_mean` from the true mean, over the proxies' mean's distance from
    it. For a guess N' that is |N / N' - 1| / (1 + N / m).
    """
    wrong = [np.linalg.norm(recovered_mean(vectors, proxy_mean, ratio) - private_mean) for ratio in ratios]
    return np.array(wrong) / np.linalg.norm(proxy_mean - private_mean)


def shape_attack(
    seed: Seed, settings: Settings, client: int, private: Dataset, held: Dataset, public: Dataset
) -> tuple[float, float, float] | None:
    """What mean and shape tell of single samples: ``shape_auc``, ``shape_cosine`` and ``shape_cosine_others`` of
    :class:`ClientAttack`. The server has both in coordinates in which the public set is white.
    """
    if not settings.by_shape:
        return None
    sent = profile(seed, settings, client, private, public, Site(client, Path()).noise(settings.seed, 1), shape=True)[
        "seed-shape"
    ]
    rows = coordinate_rows(len(public))
    white = coordinates(client_evidence(seed, settings, public.select(rows)))
    own, others = (white.white(client_evidence(seed, settings, data)) for data in (private, held))
    shape = unpacked_shape(sent, settings.router.shape_rank, own.shape[1])
    covariance, mean = shape.covariance(), own.mean(axis=0)
    likelihoods = [multivariate_normal(mean, covariance).logpdf(some) for some in (own, others)]
    directions = np.linalg.eigh(covariance)[1][:, -shape_rank(settings.router.shape_rank, len(covariance)) :]
    own_cosine, others_cosine = (
        float(np.median(np.abs((some - mean) @ directions).max(axis=1) / np.linalg.norm(some - mean, axis=1)))
        for some in (own, others)
    )
    return _auc(*likelihoods), own_cosine, others_cosine


def class_mix(seed: Seed, settings: Settings, private: Dataset, proxies: Dataset) -> tuple[float | None, bool]:
    """See :class:`ClientAttack`."""
    names = class_names(private)
    texts = text_features(seed, names, settings.data.prompt)
    with torch.inference_mode():
        logits = class_logits(seed.model, embed(seed.model, all_pixels(seed, [proxies])[:]), texts)
    guessed = np.bincount(logits.argmax(1).numpy(), minlength=len(names))
    true = np.bincount(np.asarray(private["label"]), minlength=len(names))
    flat = true.std() == 0 or guessed.std() == 0
    return None if flat else float(np.corrcoef(guessed, true)[0, 1]), bool(guessed.argmax() == true.argmax())


def confidence(seed: Seed, settings: Settings, expert: Expert, data: Dataset, private: Dataset, public: Dataset) -> np.ndarray:
    """log p / (1 - p) of the true class of every sample under an expert. [N]."""
    space = label_space(class_names(private), class_names(public))
    texts = text_features(seed, space, settings.data.prompt)
    model, labels = with_lora(seed, settings.lora, expert), labels_in(data, space)
    with torch.inference_mode():
        scores = torch.cat([class_logits(model, embed(model, batch), texts) for batch in batches(seed, data)])
    log_p = F.log_softmax(scores.double(), dim=1)[torch.arange(len(labels)), labels]
    return (log_p - torch.log(-torch.expm1(log_p).clamp(max=-1e-12))).numpy()


def likelihood_ratio(
    seed: Seed,
    settings: Settings,
    client: int,
    expert: Expert,
    private: Dataset,
    held: Dataset,
    proxies: Dataset,
    public: Dataset,
    shadows: int,
    progress: Callable[[int, int], None],
) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores of training and of held-out samples: log-likelihood of the expert's confidence if the sample was among those it
    was trained on, less that if it was not, by normal distributions fitted to the shadow experts.
    """
    if not shadows:
        return None
    rng = np.random.default_rng(derived_seed(settings.seed, _ATTACK, client))
    # As many others as members at most: a shadow is then trained on no more than the expert was.
    held = held.select(np.sort(rng.permutation(len(held))[: len(private)]))
    with no_progress_bars():
        everything = concatenate_datasets([private, held.cast(private.features)])
    space = label_space(class_names(private), class_names(public))
    start = train_expert(seed, settings, client, [proxies], space, unwatched) if settings.privacy.expert == "dp-sgd" else None
    inside, seen = np.zeros((shadows, len(everything)), dtype=bool), np.zeros((shadows, len(everything)))
    for shadow in range(shadows):
        progress(shadow, shadows)
        # Every sample is in half of the shadows: they come in pairs that share nothing.
        inside[shadow] = ~inside[shadow - 1] if shadow % 2 else rng.permutation(len(everything)) < len(everything) // 2
        members = everything.select(np.flatnonzero(inside[shadow]))
        if start is not None:
            mechanism = expert_mechanism(settings)
            trained = train_with_privacy(seed, settings, members, space, start, mechanism, rng, unwatched)
        else:
            trained = train_expert(seed, settings, client, expert_samples(settings, members, proxies), space, unwatched)
        seen[shadow] = confidence(seed, settings, trained, everything, private, public)
    progress(shadows, shadows)
    own = confidence(seed, settings, expert, everything, private, public)
    means = [np.where(mask, seen, 0).sum(0) / np.maximum(mask.sum(0), 1) for mask in (inside, ~inside)]
    spread = np.sqrt(np.mean((seen - np.where(inside, *means)) ** 2)) + 1e-6
    scores = norm.logpdf(own, means[0], spread) - norm.logpdf(own, means[1], spread)
    return scores[: len(private)], scores[len(private) :]


def _profile(seed: Seed, settings: Settings, client: int, private: Dataset, public: Dataset) -> dict[str, np.ndarray]:
    """What a client of a simulation says in stage 1, with the noise it has sent. float64."""
    arrays = profile(seed, settings, client, private, public, Site(client, Path()).noise(settings.seed, 1))
    return {name: array.astype(np.float64) for name, array in arrays.items()}


def _auc(members: Sequence[float] | np.ndarray, others: Sequence[float] | np.ndarray) -> float:
    return float(roc_auc_score(np.repeat([1, 0], [len(members), len(others)]), np.concatenate([members, others])))


def _rate_at(members: np.ndarray, others: np.ndarray, false_positives: float = 0.01) -> float:
    return float((members > np.quantile(others, 1 - false_positives)).mean())


def _shifted(progress: Callable[[int, int], None], before: int, total: int, done: int, _own: int) -> None:
    progress(before + done, total)
