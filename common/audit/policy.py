"""What may leave a client: its owner's policy, denying by default.

What *could* leave, and in exactly what form, ``common/wire.py`` derives from the seed model and the settings. A policy can
only take away from that: artifacts that it does not allow, runs that ask for too much, arrays that are too large. The server's
settings never widen it.
"""

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tomli_w
from pydantic import Field, JsonValue, ValidationError, field_validator

from metamoe.common.audit.entries import ArrayEntry, Digest, Entry, Intent, Spent
from metamoe.common.audit.touching import touching_names
from metamoe.common.config import Count, NonNegative, Positive, Section, Settings
from metamoe.common.errors import BudgetError, InputFileError, PolicyError, first_problem
from metamoe.common.privacy import Mechanism, total_epsilon

ArtifactKind = Literal[
    "client",
    "seed-routing-vector",
    "seed-ffn-inputs",
    "seed-shape",
    "relevance-classifier",
    "routing-vectors",
    "expert",
    "accuracy",
    "ledger",
]
_ARRAYS: tuple[ArtifactKind, ...] = (
    *("client", "seed-routing-vector", "seed-ffn-inputs", "seed-shape", "relevance-classifier", "routing-vectors", "accuracy"),
)
"""Kinds that are one array of that name."""
_LEDGER_ARRAYS = ("audit-key", "ledger-root", "ledger-signature")


class Between(Section):
    """Numbers between two, which are among them; without one of them there is no bound on that side."""

    min: float | None = None
    max: float | None = None


Allowed = Literal["any"] | Between | list[JsonValue]
"""What a server may choose of one setting: anything, a number between two, or one of a list."""


class Rule(Section):
    """One kind of artifact that may leave.

    Attributes:
        purpose: what for, in the owner's words.
        private: it leaves only with differential privacy.
        max_norm: largest Euclidean norm of one array.
        releases_per_run: how often in one run.
    """

    purpose: str
    private: bool = False
    max_norm: Positive = 1_000.0
    releases_per_run: Count = 1


class Limits(Section):
    """What no run may ask for, whatever is allowed to leave."""

    max_bytes_per_run: Count = Field(256_000_000, description="array bytes of all replies of one run")
    max_lora_rank: Count = Field(64, description="a larger expert can hold more of what it was trained on")
    min_private_samples: Count = Field(20, description="a mean over fewer says too much about each of them")
    max_distinct_statistics: int = Field(
        3,
        ge=0,
        description="different exact ones of each kind of artifact over the client's life, and ones with noise where no budget "
        "is set; the same again is sent as it was and is no other; 0 is no limit",
    )
    reply_time_step: NonNegative = Field(
        10.0, description="seconds; replies wait for the next multiple, so that the time taken does not tell the amount of data"
    )


class Budget(Section):
    """The most (epsilon, delta) that all runs together may spend on what is released with differential privacy."""

    epsilon: Positive
    delta: Annotated[float, Field(gt=0, lt=1)]


class Policy(Section):
    """What may leave one client."""

    version: Literal[1] = 1
    allow: dict[ArtifactKind, Rule]
    limits: Limits = Limits()
    budget: Budget | None = None
    server: Digest | None = Field(None, description="public key of the server's ledger; a run of any other server is refused")
    seed_models: list[Digest] | Literal["any"] = Field(
        [], description="fingerprints of those that a server may use; none: that of the first run"
    )
    public_sets: list[Digest] | Literal["any"] = Field(
        [], description="fingerprints of those that a server may use; none: that of the first run"
    )
    settings: dict[str, Allowed] | Literal["any"] = Field(
        {},
        description="what a server may choose of the settings that touch private data, by name: any, a range {min, max}, or a "
        "list of values; what is not here stays as in the first run",
    )

    @field_validator("settings")
    @classmethod
    def _known(cls, settings: dict[str, Allowed] | str) -> dict[str, Allowed] | str:
        if unknown := sorted(set(settings) - touching_names()) if isinstance(settings, dict) else []:
            raise ValueError(f"{unknown[0]!r} is no setting that touches private data; see metamoe settings")
        return settings


DEFAULT = Policy(
    allow={
        "client": Rule(purpose="tells the server which client answers"),
        "seed-routing-vector": Rule(purpose="proxy selection: public samples near to the private ones are found with it"),
        "seed-ffn-inputs": Rule(purpose="routing: inputs near to this mean go to this client's expert"),
        "seed-shape": Rule(purpose="routing: how the samples scatter about their mean tells domains apart that lie close"),
        "expert": Rule(purpose="the expert becomes part of the unified model"),
        "ledger": Rule(purpose="lets the server and an auditor check this client's ledger"),
    }
)
"""For a client without a policy of its own: what the product's defaults send."""

SIMULATION = Policy(
    allow=dict(DEFAULT.allow)
    | {
        "relevance-classifier": Rule(purpose="proxy selection as in the paper's Appendix A", max_norm=1e6),
        "routing-vectors": Rule(purpose="routing as in the paper"),
        "accuracy": Rule(purpose="the table of results"),
    },
    limits=Limits(
        max_bytes_per_run=10**12, max_lora_rank=10**6, min_private_samples=1, max_distinct_statistics=0, reply_time_step=0
    ),
    seed_models="any",
    public_sets="any",
    settings="any",
)
"""For a simulation, whose data is the researcher's own: all that there is, as soon as it is computed."""


def load_policy(file: Path) -> Policy:
    """A policy from a TOML file.

    Raises:
        InputFileError: it cannot be read, or is not one; names the line at fault.
    """
    try:
        return Policy.model_validate(tomllib.loads(file.read_text()))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputFileError(f"policy {file} cannot be read: {error}") from error
    except ValidationError as error:
        raise InputFileError(f"policy {file}: {first_problem(error)}") from error


def policy_text(policy: Policy) -> str:
    """The policy as TOML; :func:`load_policy` reads it back to an equal value."""
    return tomli_w.dumps(policy.model_dump(mode="json", by_alias=True, exclude_none=True))


def policy_hash(policy: Policy) -> str:
    """SHA-256 of :func:`policy_text`."""
    return hashlib.sha256(policy_text(policy).encode()).hexdigest()


def kind_of_array(name: str) -> ArtifactKind:
    """Which kind of artifact an array is part of, by its name.

    Raises:
        PolicyError: it is none that is known.
    """
    if name in _LEDGER_ARRAYS:
        return "ledger"
    if name.endswith((".lora_A.weight", ".lora_B.weight")):
        return "expert"
    for kind in _ARRAYS:
        if name == kind:
            return kind
    raise PolicyError(f"array {name!r} is no artifact that a policy knows")


def check_request(policy: Policy, settings: Settings, arrays: Sequence[str], ledger: Sequence[Entry]) -> None:
    """Whether a reply of these arrays may be given at all; asked before anything is computed.

    Args:
        policy: the owner's.
        settings: the run's.
        arrays: the names of what the reply would hold.
        ledger: the entries of this run so far.

    Raises:
        PolicyError: an artifact is not allowed, or not once more in this run; or the settings go beyond a limit.
    """
    limits, data = policy.limits, settings.data
    if settings.lora.rank > limits.max_lora_rank:
        raise PolicyError(f"lora.rank = {settings.lora.rank} is more than this client's policy allows: {limits.max_lora_rank}")
    if 0 < data.private_samples < limits.min_private_samples:
        raise PolicyError(
            f"data.private-samples = {data.private_samples} is less than this client's policy allows: "
            f"{limits.min_private_samples}"
        )
    sent = [intent for intent in ledger if isinstance(intent, Intent)]
    for kind in {kind_of_array(name): None for name in arrays}:
        if kind not in policy.allow:
            raise PolicyError(f"this client's policy does not allow {kind!r} to leave")
        before = sum(any(kind_of_array(array.name) == kind for array in intent.arrays) for intent in sent)
        # A ledger's own key and signature are two messages of one kind.
        if before >= policy.allow[kind].releases_per_run * (2 if kind == "ledger" else 1):
            raise PolicyError(f"{kind!r} was released {before} times in this run, and this client's policy allows no more")


def check_budget(policy: Policy, planned: Sequence[Spent], arrays: Sequence[str], ledger: Sequence[Entry]) -> None:
    """Whether what a reply would spend is left, and what needs differential privacy has it; asked before anything is computed.

    Args:
        policy: the owner's.
        planned: what the reply would spend.
        arrays: the names of what it would hold.
        ledger: all entries of this client, of all runs.

    Raises:
        BudgetError: too much, or too little.
    """
    covered = {name for spent in planned for name in spent.covers}
    for name in arrays:
        rule = policy.allow.get(kind_of_array(name))
        if rule and rule.private and name not in covered:
            raise BudgetError(
                f"this client's policy lets {kind_of_array(name)!r} leave with differential privacy only; see the "
                "settings of the group privacy"
            )
    if policy.budget and planned:
        before = [spent for entry in ledger if isinstance(entry, Intent) for spent in entry.spent]
        total = epsilon_of([*before, *planned], policy.budget.delta)
        if total > policy.budget.epsilon:
            raise BudgetError(
                f"after this reply all runs together would have spent epsilon = {total:.2f} at delta = "
                f"{policy.budget.delta:g}; this client's policy allows {policy.budget.epsilon:g}"
            )


def epsilon_of(spent: Sequence[Spent], delta: float) -> float:
    """The epsilon of all these releases together."""
    return total_epsilon([Mechanism(s.noise_multiplier, s.sampling_rate, s.steps) for s in spent], delta)


def check_private_samples(policy: Policy, count: int) -> None:
    """Whether there are enough private samples for a mean over them to leave.

    Raises:
        PolicyError: there are fewer than ``limits.min-private-samples``.
    """
    if count < policy.limits.min_private_samples:
        raise PolicyError(f"{count} private samples; this client's policy wants at least {policy.limits.min_private_samples}")


def check_arrays(policy: Policy, arrays: Mapping[str, np.ndarray], sent: Sequence[ArrayEntry]) -> None:
    """Whether these arrays, whose form has been checked, may leave.

    Args:
        policy: the owner's.
        arrays: what is about to be sent.
        sent: what this run has sent before.

    Raises:
        PolicyError: names the array and the limit.
    """
    for name, array in arrays.items():
        kind = kind_of_array(name)
        if kind not in policy.allow:
            raise PolicyError(f"this client's policy does not allow {kind!r} to leave")
        if array.dtype.kind != "f":
            continue
        norm = float(np.linalg.norm(array.astype(np.float64).ravel()))
        if not norm <= policy.allow[kind].max_norm:
            raise PolicyError(f"array {name!r} has the norm {norm:.3g}; allowed is {policy.allow[kind].max_norm:.3g}")
    total = sum(array.bytes for array in sent) + sum(array.nbytes for array in arrays.values())
    if total > policy.limits.max_bytes_per_run:
        raise PolicyError(f"{total:,} bytes in this run; this client's policy allows {policy.limits.max_bytes_per_run:,}")
