"""Stage 3 with more clients than the unified model may have experts: the nearest ones share an expert."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from scipy.linalg import solve_triangular

from metamoe.common.config import Settings
from metamoe.common.fisher import shrunk_covariance
from metamoe.common.gaussian import Coordinates, Shape, merged_shape, public_coordinates
from metamoe.common.model.lora import Expert, rounded
from metamoe.common.model.seed import Seed
from metamoe.common.model.vectors import evidence_of
from metamoe.server.experts import ADAPTER, store_expert, stored_vectors
from metamoe.server.proxies import Selection
from metamoe.server.shapes import client_gaussians, sent_means, sent_shape

_COVARIANCE_SAMPLES = 4_000


@dataclass(frozen=True)
class Contribution:
    """What becomes one expert of the unified model: its name, where its matrices lie, routing vectors [P, d] if there are any,
    proxies, and its shape if there is one.
    """

    name: str
    folder: Path
    vectors: np.ndarray | None
    selection: Selection
    shape: Shape | None = None


def contribution(
    name: str, folder: Path, profile: Mapping[str, np.ndarray], selection: Selection, settings: Settings
) -> Contribution:
    """What one client contributes, wherever it said it.

    Args:
        name, folder: the client's, and where its expert is stored.
        profile: its arrays of stage 1.
        selection: its proxies.
        settings: the run's.
    """
    if settings.router.vectors == "seed" and settings.router.rows != "fresh":
        return Contribution(name, folder, sent_means(profile, settings), selection, sent_shape(profile, settings))
    return Contribution(name, folder, stored_vectors(folder), selection)


def clusters(points: np.ndarray, count: int) -> list[list[int]]:
    """Clients in ``count`` groups that lie near each other (Ward's method).

    Args:
        points: one of each client, [K, D].
        count: of groups, at most K.

    Returns:
        Row numbers, ascending within a group; groups by their first.
    """
    if count == 1:
        return [list(range(len(points)))]
    # Not before it is needed, which with few clients it is not.
    from sklearn.cluster import AgglomerativeClustering

    labels = AgglomerativeClustering(count).fit_predict(points)
    return sorted(np.flatnonzero(labels == label).tolist() for label in range(count))


def merged_expert(folders: Sequence[Path], rank: int) -> Expert:
    """The expert of given rank nearest to the mean of several: B A ~ (1/K) sum_k B_k A_k, cut off after ``rank`` singular
    values.

    One matrix is read of each at a time, so memory does not grow with their number.

    Args:
        folders: stored experts, of one shape.
        rank: r.

    Returns:
        float16 matrices A [r, in] and B [out, r] of every adapted linear map.
    """
    merged: Expert = {}
    with safe_open(folders[0] / ADAPTER, "pt") as file:
        names = [name for name in file.keys() if ".lora_A." in name]  # noqa: SIM118
    for name in names:
        mean = torch.zeros(())
        for folder in folders:
            with safe_open(folder / ADAPTER, "pt") as file:
                a, b = (file.get_tensor(key).float() for key in (name, name.replace(".lora_A.", ".lora_B.")))
            mean = mean + b @ a / len(folders)
        left, values, right = torch.linalg.svd(mean, full_matrices=False)
        root = values[:rank].sqrt()
        plain = name.removeprefix("base_model.model.")
        merged[plain] = root[:, None] * right[:rank]
        merged[plain.replace(".lora_A.", ".lora_B.")] = left[:, :rank] * root
    return rounded(merged)


def merged_selection(selections: Sequence[Selection], count: int) -> Selection:
    """As many proxies as one client has, out of several clients' in turn, in the order in which they were picked."""
    taken: dict[int, tuple[float, float]] = {}
    for place in range(max(len(selection.ids) for selection in selections)):
        for selection in selections:
            if place < len(selection.ids):
                taken.setdefault(int(selection.ids[place]), (selection.scores[place], selection.relevance[place]))
    ids = list(taken)[:count]
    scores, relevance = zip(*(taken[i] for i in ids), strict=True)
    return Selection(np.array(ids), np.array(scores), np.array(relevance))


def merge(
    sent: Sequence[Contribution], settings: Settings, seed: Seed, features: np.ndarray
) -> tuple[list[Contribution], dict[str, list[str]]]:
    """What clients contributed, as at most ``experts.max`` contributions; merged experts are stored beside the clients'.

    Args:
        sent: the clients'.
        settings, seed: the run's.
        features: the public samples' mean FFN inputs in the seed, and last their embedding, [n, P + 1, d].

    Returns:
        The contributions, and by their names the clients of those that are merged.
    """
    if len(sent) <= settings.experts.max:
        return list(sent), {}
    parts, merged = [], {}
    white = public_coordinates(evidence_of(features, settings.router)) if settings.by_shape else None
    points = _means(sent, features) if white is None else _gaussians(sent, settings, white)
    for group in clusters(points, settings.experts.max):
        members = [sent[k] for k in group]
        if len(members) == 1:
            parts += members
            continue
        name = f"{members[0].name}-and-{len(members) - 1}-more"
        folder = members[0].folder.parent / name
        vectors = [member.vectors for member in members if member.vectors is not None]
        arrays = {key: matrix.numpy() for key, matrix in merged_expert([m.folder for m in members], settings.lora.rank).items()}
        mean = np.mean(vectors, axis=0) if vectors else None
        store_expert(folder, seed, settings.lora, arrays if mean is None else arrays | {"routing-vectors": mean})
        selection = merged_selection([member.selection for member in members], settings.proxies.count)
        parts.append(Contribution(name, folder, mean, selection, _merged_shape(members, settings, white)))
        merged[name] = [member.name for member in members]
    return parts, merged


def _merged_shape(members: Sequence[Contribution], settings: Settings, white: Coordinates | None) -> Shape | None:
    """The shape of those that have one, together; None if none has."""
    known = [(part.vectors.ravel(), part.shape) for part in members if part.vectors is not None and part.shape is not None]
    if white is None or not known:
        return None
    means, shapes = zip(*known, strict=True)
    return merged_shape(white.white(np.stack(means)), shapes, settings.router.shape_rank)


def _gaussians(sent: Sequence[Contribution], settings: Settings, white: Coordinates) -> np.ndarray:
    """Points whose distances are those of the contributions' Gaussians, by which the router decides. [K, K]."""
    means = np.stack([part.vectors.ravel() for part in sent if part.vectors is not None])
    return client_gaussians(means, [part.shape for part in sent], white, settings.router, seed=False).points()


def _means(sent: Sequence[Contribution], features: np.ndarray) -> np.ndarray:
    """A point of each contribution, [K, D]: its routing vectors or, where none were sent, the mean of how the seed sees the
    proxies; white by the same feature's covariance on public data, if that is known.
    """
    own = [part.vectors for part in sent if part.vectors is not None]
    if len(own) == len(sent):
        vectors, public = np.stack(own), features[:, :-1]
    else:
        vectors, public = np.stack([features[np.sort(part.selection.ids)].mean(axis=0) for part in sent]), features
    points = vectors.reshape(len(sent), -1)
    if public.shape[1:] != vectors.shape[1:]:
        return points
    sample = public[:: -(-len(public) // _COVARIANCE_SAMPLES)]
    factor = np.linalg.cholesky(shrunk_covariance(sample.reshape(len(sample), -1)))
    return solve_triangular(factor, points.T, lower=True).T
