"""Who has what: how a set is divided among simulated clients, as numbers, in a terminal, and in a picture."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from metamoe.common.config import Settings
from metamoe.common.data.datasets import check_domains, load_domain, private_rows
from metamoe.common.data.partition import OWNERS
from metamoe.common.errors import EmptyPartitionError, InputFileError

_SHADES = " ▁▂▃▄▅▆▇█"
_CELLS = 60
FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Share:
    """What one client has of its domain's training samples.

    Attributes:
        client, domain: their names.
        owner: the value of ``data.partition.column`` that is this client; empty without.
        counts: samples by class; without classes, of all.
        whole: the same of the domain.
    """

    client: str
    domain: str
    owner: str
    counts: dict[str, int]
    whole: dict[str, int]

    @property
    def samples(self) -> int:
        return sum(self.counts.values())

    @property
    def classes(self) -> int:
        """How many classes it has any sample of."""
        return sum(count > 0 for count in self.counts.values())


def shares(settings: Settings) -> Iterator[Share]:
    """What each client has, domain by domain; a client can have nothing, which a run refuses.

    Raises:
        InvalidSettingError: the data cannot be divided so, or a domain does not exist.
    """
    check_domains(settings.data)
    for domain in settings.data.domains:
        if domain not in map(settings.client_domain, range(settings.clients)):
            continue
        data = load_domain(settings.data, domain, "train")
        names = list(data.features["label"].names) if "label" in data.features else [""]
        labels = np.asarray(data["label"]) if "label" in data.features else np.zeros(len(data), dtype=int)
        whole = _counted(labels, names)
        for client, name in enumerate(settings.client_names):
            if settings.client_domain(client) == domain:
                rows = private_rows(settings, client, data)
                owner = data[int(rows[0])][OWNERS] if settings.data.partition.kind == "natural" else ""
                yield Share(name, domain, owner, _counted(labels[rows], names), whole)


def strip(share: Share) -> str:
    """One character a class, in the order of the domain: how much of the class's samples this client has, from none to all;
    of many classes several to a character.
    """
    groups = np.array_split(np.arange(len(share.whole)), min(_CELLS, len(share.whole)))
    own, whole = np.array(list(share.counts.values())), np.array(list(share.whole.values()))
    parts = [own[group].sum() / max(1, whole[group].sum()) for group in groups]
    return "".join(_SHADES[int(np.ceil(part * (len(_SHADES) - 1)))] for part in parts)


def picture(found: Sequence[Share], file: Path) -> None:
    """Write a picture with a row for each client and a column for each class: how much of the class the client has; beside it
    its number of samples. The form is the file's ending: .png, .svg or .pdf.

    Raises:
        InputFileError: the file has another ending, or cannot be written.
    """
    if file.suffix.lower() not in FORMATS:
        raise InputFileError(f"{file}: a picture's name has to end in {', '.join(FORMATS)}")
    domains = list(dict.fromkeys(share.domain for share in found))
    rows = [[share for share in found if share.domain == domain] for domain in domains]
    heights = [max(2, len(there)) for there in rows]
    figure = Figure(figsize=(9, 1 + 0.28 * sum(heights) + 0.9 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 2, squeeze=False, width_ratios=[4, 1], height_ratios=heights)
    for (left, right), there in zip(axes, rows, strict=True):
        whole = np.maximum(1, list(there[0].whole.values()))
        shown = left.imshow(
            np.array([list(share.counts.values()) for share in there]) / whole, aspect="auto", cmap="Blues", vmin=0, vmax=1
        )
        left.set_yticks(range(len(there)), [f"{s.client} ({s.owner})" if s.owner else s.client for s in there])
        left.set_xlabel(f"classes of {there[0].domain} ({len(whole)})" if len(whole) > 1 else f"{there[0].domain}, no classes")
        left.set_xticks([])
        right.barh(range(len(there)), [share.samples for share in there], color="#0072b2")
        right.set_ylim(left.get_ylim())
        right.set_yticks([])
        right.set_xlabel("samples")
    figure.colorbar(shown, ax=axes[:, 0].tolist(), location="top", shrink=0.5, label="share of the class that a client has")
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise InputFileError(f"{file} cannot be written: {error}") from error


def left_over(found: Sequence[Share]) -> dict[str, tuple[int, int]]:
    """Training samples of a domain that no client has, and all of it, for domains that have such: of classes that were dealt to
    nobody, or beyond ``data.private-samples``.
    """
    whole = {share.domain: sum(share.whole.values()) for share in found}
    had = {domain: sum(share.samples for share in found if share.domain == domain) for domain in whole}
    return {domain: (whole[domain] - had[domain], whole[domain]) for domain in whole if had[domain] < whole[domain]}


def check_shares(found: Sequence[Share]) -> None:
    """Raise if a client has nothing.

    Raises:
        EmptyPartitionError: names those who have nothing.
    """
    if empty := [share.client for share in found if not share.samples]:
        raise EmptyPartitionError(f"{', '.join(empty)} would have no training samples; use fewer clients, or divide otherwise")


def _counted(labels: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    return dict(zip(names, np.bincount(labels, minlength=len(names)).tolist(), strict=True))
