"""What may leave a client, in plain language."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from metamoe.common.audit.entries import ArrayEntry, Intent, Spent
from metamoe.common.audit.policy import Allowed, ArtifactKind, Between, Policy, kind_of_array
from metamoe.common.errors import PolicyError


@dataclass(frozen=True)
class Words:
    """An artifact for somebody who answers for the data: what it is, how it comes about, what touched it, what it can tell."""

    what: str
    how: str
    samples: str
    reveals: str


_ALL = "all private training samples of this client"
EXPLAINED: dict[ArtifactKind, Words] = {
    "client": Words(
        "the client's number in the federation",
        "it stands in the node's configuration",
        "none",
        "nothing about the data",
    ),
    "seed-routing-vector": Words(
        "one vector: where this client's data lies, as the seed model sees it",
        "the mean of the frozen seed model's embedding",
        _ALL,
        "a statistic of the data: what kind of images or texts these are, and to some degree the mix of their classes; with "
        "few samples, something about each. It is exact unless privacy.vectors = gaussian",
    ),
    "seed-ffn-inputs": Words(
        "one vector for each layer at which the router looks",
        "means of the inputs of the frozen seed model's feed-forward sublayers",
        _ALL,
        "the same as the seed routing vector: they are statistics of the same samples",
    ),
    "seed-shape": Words(
        "the shape of this client's data, as the seed model sees it: in which directions it scatters, and how far",
        "the covariance of the frozen seed model's features, shrunk, all of it or its largest directions",
        _ALL,
        "more than the mean: how much the samples differ and what differs together, so more of the mix of their kinds, and of "
        "single ones far from the rest; of fewer samples than it has directions, how many there are",
    ),
    "relevance-classifier": Words(
        "a linear classifier that tells private from public samples",
        "logistic regression on the seed model's embeddings",
        _ALL + ", against public ones",
        "more than a mean: it is fitted to single samples, and is never released with differential privacy here",
    ),
    "routing-vectors": Words(
        "one vector for each layer, of what the expert was trained on",
        "means of feed-forward inputs in the trained expert, over private samples and proxies together",
        _ALL + ", and its proxies",
        "the direction from the proxies' mean to the private mean exactly, and with a guess of the amount of data the private "
        "mean itself; no bound on it can be proven, because the expert was trained on the same samples",
    ),
    "expert": Words(
        "the expert: LoRA matrices on the seed model's feed-forward sublayers",
        "trained on this client",
        _ALL + ", and its proxies",
        "what the domain looks like, and to some degree whether a given sample was among those it was trained on (membership "
        "inference); covered by an epsilon only if privacy.expert = dp-sgd",
    ),
    "accuracy": Words(
        "the accuracy of the delivered model on this client's own test samples",
        "measured on this client",
        "all private test samples of this client",
        "how well the model does here; to some degree how many test samples there are",
    ),
    "ledger": Words(
        "public key, Merkle root and signature of this client's ledger",
        "hashes of what was sent",
        "none but through what was sent",
        "nothing that was not sent anyway",
    ),
}


def policy_lines(policy: Policy) -> list[str]:
    """A policy in sentences."""
    lines = []
    for kind, words in EXPLAINED.items():
        rule = policy.allow.get(kind)
        if rule is None:
            lines.append(f"{kind} never leaves: {words.what}.")
            continue
        private = " with differential privacy" if rule.private else ""
        times = "once" if rule.releases_per_run == 1 else f"{rule.releases_per_run} times"
        lines.append(f"{kind} may leave {times} in a run{private}: {words.what}. Purpose: {rule.purpose}.")
    limits = policy.limits
    lines.append(
        "Nothing else leaves: no text, no metric, no example count, no array of another name, type or shape. A failure leaves "
        "as a number without a reason."
    )
    lines.append(
        f"In one run at most {limits.max_bytes_per_run:,} bytes; experts of rank {limits.max_lora_rank} or less; only with "
        f"{limits.min_private_samples} private samples or more."
    )
    if limits.reply_time_step:
        lines.append(f"Replies wait for the next multiple of {limits.reply_time_step:g} seconds after the request.")
    else:
        lines.append("Replies leave as soon as they are computed: the time taken tells the amount of data.")
    lines += _over_all_runs(policy)
    if policy.server:
        lines.append(f"Only for runs of the server whose ledger has the key {policy.server[:16]}….")
    if budget := policy.budget:
        lines.append(f"All runs together may spend epsilon {budget.epsilon:g}, delta {budget.delta:g} of differential privacy.")
    else:
        lines.append("No epsilon limits what all runs together reveal: no privacy budget is set.")
    return lines


def _over_all_runs(policy: Policy) -> Iterable[str]:
    """What a server may choose, and how often it may ask."""
    if policy.settings == "any":
        yield "A server may choose every setting, and so over which samples, and of what, each mean is taken."
    else:
        yield (
            "A server chooses no setting that touches private data: each stays as in the first run that this client answered, "
            "and so do the samples over which means are taken"
            + (", but for these:" if policy.settings else ".")
            + "".join(f" {name} ({_choice_words(rule)});" for name, rule in policy.settings.items()).rstrip(";")
        )
    for what, allowed in (("seed model", policy.seed_models), ("public set", policy.public_sets)):
        if allowed == "any":
            yield f"A server may use any {what}."
        elif allowed:
            yield f"The {what} is {' or '.join(f'{digest[:16]}…' for digest in allowed)}."
        else:
            yield f"The {what} is that of the first run that this client answered."
    if most := policy.limits.max_distinct_statistics:
        yield (
            f"Over all runs at most {most} different exact ones of each artifact leave; the same again is sent as it was, "
            "to the bit. With noise they do not count where a budget is set."
        )
    else:
        yield "There is no limit to how many different exact ones of each artifact leave over all runs."


def _choice_words(rule: Allowed) -> str:
    match rule:
        case "any":
            return "any"
        case Between(min=least, max=most):
            return " ".join([f"at least {least:g}"] * (least is not None) + [f"at most {most:g}"] * (most is not None))
        case _:
            return " or ".join(map(str, rule))


@dataclass(frozen=True)
class Coverage:
    """The releases of one kind of artifact: how many, how many of them exact, and what the others have spent."""

    releases: int
    exact: int
    spent: list[Spent]


def privacy_of(intents: Iterable[Intent]) -> dict[ArtifactKind, Coverage]:
    """By which epsilon each kind of artifact is covered that depends on private samples. A release is exact unless all of its
    arrays are covered.
    """
    by_kind: dict[ArtifactKind, Coverage] = {}
    for intent in intents:
        for kind, arrays in released([intent]).items():
            if kind in ("client", "ledger"):
                continue
            names = {array.name for array in arrays}
            spent = [s for s in intent.spent if names & set(s.covers)]
            exact = not names <= {name for s in spent for name in s.covers}
            before = by_kind.get(kind, Coverage(0, 0, []))
            by_kind[kind] = Coverage(before.releases + 1, before.exact + exact, [*before.spent, *spent])
    return by_kind


def coverage_words(coverage: Coverage) -> str:
    """Each epsilon, and what is covered by none."""
    spent = sorted({f"epsilon {s.epsilon:g}, delta {s.delta:g}" for s in coverage.spent})
    covered = [f"covered by {'; '.join(spent)}"] if spent else []
    which = "" if coverage.exact == coverage.releases else f"{coverage.exact} of {coverage.releases} releases "
    return ", ".join([*covered, *([f"{which}exact, covered by no epsilon"] if coverage.exact else [])])


def released(intents: Iterable[Intent]) -> dict[ArtifactKind, list[ArrayEntry]]:
    """What was sent, by kind of artifact, in the order in which it was first sent; without what is of no kind, which is a
    violation of every policy.
    """
    by_kind: dict[ArtifactKind, list[ArrayEntry]] = {}
    for intent in intents:
        for array in intent.arrays:
            with suppress(PolicyError):
                by_kind.setdefault(kind_of_array(array.name), []).append(array)
    return by_kind
