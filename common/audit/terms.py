"""What a server may ask over all runs of a client: which settings it may choose, and how many exact statistics it may have.

A mean tells little about a record. Two means over sets that differ in one record tell that record: it is their difference times
the number averaged over. So whoever asks must not choose over whom, or of what, the next mean is taken, and there must not be
many.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from metamoe.common.audit.entries import ArrayEntry, Entry, Intent, Open, Spent, canonical
from metamoe.common.audit.policy import Allowed, ArtifactKind, Between, Policy, kind_of_array
from metamoe.common.audit.touching import touching
from metamoe.common.config import Settings
from metamoe.common.errors import PolicyError
from metamoe.common.files import write_atomically

_OF_NO_SAMPLE = ("client", "ledger")


@dataclass(frozen=True)
class Terms:
    """What a run's statistics are of: the settings that touch private data, and fingerprints of the seed and the public set."""

    settings: Mapping[str, Any]
    seed_model: str
    public_set: str


def keep_settings(folder: Path, settings: Settings) -> None:
    """Keep a run's settings beside the ledger, which has their hash, in the form in which they were hashed."""
    content = canonical(settings.model_dump(mode="json", by_alias=True))
    file = settings_file(folder, hashlib.sha256(content).hexdigest())
    if not file.exists():
        write_atomically(file, content)


def settings_file(folder: Path, digest: str) -> Path:
    """Where the settings with this hash lie beside a ledger."""
    return folder / f"settings-{digest}.json"


def terms_of(folder: Path, opened: Open) -> Terms | None:
    """What a run was of that a ledger has; None where its settings were not kept.

    Raises:
        PolicyError: what was kept is not what the ledger has the hash of.
    """
    file = settings_file(folder, opened.settings)
    if not file.is_file():
        return None
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != opened.settings:
        raise PolicyError(f"{file.name} is not the settings that the ledger names")
    try:
        return Terms(touching(json.loads(content)), opened.seed_model, opened.public_set)
    except (ValueError, AttributeError) as error:
        raise PolicyError(f"{file.name} holds no settings: {error}") from error


def first_terms(folder: Path, entries: Sequence[Entry]) -> Terms | None:
    """The terms of the first run in which anything left, which is what all later ones keep to; None if nothing has.

    Raises:
        PolicyError: as :func:`terms_of`.
    """
    answered = dict.fromkeys(entry.run for entry in entries if isinstance(entry, Intent))
    opened = {entry.run: entry for entry in entries if isinstance(entry, Open)}
    for run in answered:
        if run in opened and (terms := terms_of(folder, opened[run])):
            return terms
    return None


def pinned(policy: Policy, terms: Terms) -> Policy:
    """The policy, where a server can ask for these terms and no others, from the first run on."""
    chosen = {"seed_models": [terms.seed_model], "public_sets": [terms.public_set]}
    return policy.model_copy(update={**chosen, "settings": {name: [value] for name, value in terms.settings.items()}})


def check_terms(policy: Policy, asked: Terms, first: Terms | None, *, idle: bool = False) -> None:
    """Whether a server may ask this; asked before anything is loaded or computed.

    Args:
        policy: the owner's.
        asked: the run's.
        first: of the first run that was answered; None where this is it.
        idle: whether what is asked is of no private sample.

    Raises:
        PolicyError: names the setting, its value, and the rule.
    """
    for problem in problems(policy, asked, first, idle=idle):
        raise PolicyError(problem)


def problems(policy: Policy, asked: Terms, first: Terms | None, *, idle: bool) -> Iterable[str]:
    """What of a run its policy does not allow the server to ask, each in a sentence.

    An idle client, which says nothing of its samples, minds no places that others get beside those of its first run, unless its
    owner has a rule for them.
    """
    before = first or asked
    for what, digest, allowed, first_digest in (
        ("seed model", asked.seed_model, policy.seed_models, before.seed_model),
        ("public set", asked.public_set, policy.public_sets, before.public_set),
    ):
        place = what.replace(" ", "-") + "s"
        if allowed != "any" and digest not in (allowed or [first_digest]):
            yield f"{what} {digest[:16]} is none that this client's policy allows (rule {place}; empty: the first)"
    if policy.settings == "any":
        return
    for name, value in asked.settings.items():
        rule = policy.settings.get(name)
        if rule is not None:
            if not _within(rule, value):
                yield f"{name} = {value!r} is not what this client's policy allows (rule settings)"
        elif (known := before.settings.get(name, value)) != value and not (idle and _more_places(name, known, value)):
            yield (
                f"{name} = {value!r}: it touches private data, and stays {known!r}, as in the first run, until this client's "
                f"policy allows others (rule settings; to allow this: {json.dumps(name)} = {json.dumps([known, value])})"
            )


def _more_places(name: str, before: Any, value: Any) -> bool:
    """Whether a setting gives a run places beside those that it had. Values are a file's, and can be anything."""
    if name == "clients":
        return type(before) is type(value) is int and bool(value > before)
    listed = isinstance(before, list) and isinstance(value, list)
    return name in ("data.domains", "data.hub") and listed and value[: len(before)] == before


def tells_of_samples(intent: Intent) -> bool:
    """Whether a message says anything of private samples."""
    return bool(_by_kind(intent.arrays, [], noise_counts=True))


def statistics(intents: Iterable[Intent], *, noise_counts: bool) -> dict[ArtifactKind, set[object]]:
    """The different statistics of private samples that left, of each kind of artifact.

    The same arrays again are the same statistic. Not so a single number: it may come out alike for another question.

    Args:
        intents: of all runs.
        noise_counts: whether those with noise count, which is where no budget says how much of it there may be.
    """
    found: dict[ArtifactKind, set[object]] = {}
    for intent in intents:
        for kind, arrays in _by_kind(intent.arrays, intent.spent, noise_counts=noise_counts).items():
            alone = sum(prod(array.shape) for array in arrays) == 1
            identity = intent.message if alone else frozenset((array.name, array.sha256) for array in arrays)
            found.setdefault(kind, set()).add(identity)
    return found


def check_statistics(
    policy: Policy, arrays: Sequence[str], planned: Sequence[Spent], ledger: Sequence[Entry], ready: Sequence[ArrayEntry]
) -> None:
    """Whether one more statistic of each of these kinds may leave; asked before it is computed.

    Args:
        policy: the owner's.
        arrays: the names of what the reply would hold.
        planned: the differential privacy that it would spend.
        ledger: all entries of this client, of all runs.
        ready: the arrays, where they are kept from before.

    Raises:
        PolicyError: names the kind and the limit.
    """
    most, counts = policy.limits.max_distinct_statistics, policy.budget is None
    if not most:
        return
    before = statistics((entry for entry in ledger if isinstance(entry, Intent)), noise_counts=counts)
    covered = set() if counts else {name for spent in planned for name in spent.covers}
    again = {frozenset((a.name, a.sha256) for a in group) for group in _by_kind(ready, [], noise_counts=True).values()}
    for kind in dict.fromkeys(kind_of_array(name) for name in arrays if name not in covered):
        known = before.get(kind, set())
        if kind not in _OF_NO_SAMPLE and len(known) >= most and not known & again:
            raise PolicyError(
                f"{len(known)} different {kind!r} have left this client in all its runs, and its policy allows no more "
                f"(limits.max-distinct-statistics = {most}): the same again is sent as it was; for another one raise the "
                "limit, or ask for noise under a budget"
            )


def _by_kind(
    arrays: Iterable[ArrayEntry], spent: Sequence[Spent], *, noise_counts: bool
) -> dict[ArtifactKind, list[ArrayEntry]]:
    covered = set() if noise_counts else {name for each in spent for name in each.covers}
    found: dict[ArtifactKind, list[ArrayEntry]] = {}
    for array in arrays:
        # What is of no kind is a violation of its own.
        with suppress(PolicyError):
            if array.name not in covered and (kind := kind_of_array(array.name)) not in _OF_NO_SAMPLE:
                found.setdefault(kind, []).append(array)
    return found


def _within(rule: Allowed, value: object) -> bool:
    match rule:
        case "any":
            return True
        case Between(min=least, max=most):
            if isinstance(value, bool) or not isinstance(value, int | float):
                return False
            return (least is None or value >= least) and (most is None or value <= most)
        case _:
            # In Python true is 1; in a policy it is not.
            return any(type(choice) is type(value) and choice == value for choice in rule)
