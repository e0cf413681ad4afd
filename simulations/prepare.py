"""Before a simulation: everything that can be found missing or empty is found now, not after minutes."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace

from metamoe.common.config import Settings
from metamoe.common.errors import InvalidSettingError, MetaMoEError, RunFailedError, by_code

_APART = (sys.executable, "-P", "-m", "metamoe.simulations.prepare")


@dataclass(frozen=True)
class Placement:
    """Where a simulation computes.

    Attributes:
        cards: GPUs that torch sees.
        share: of a GPU, of each client on Ray; 0 for none, and then Ray hides them all from it.
        lines: where each side computes, in words.
        warnings: what of the machine is left unused.
    """

    cards: int = 0
    share: float = 0.0
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def prepare(settings: Settings, on_ray: bool) -> Placement:
    """Make or open every data set of a run once, so that its processes find them in the cache, and see where it will compute.

    Args:
        settings: of the run.
        on_ray: whether clients are Ray's actors; else all is in one process.

    Raises:
        InvalidSettingError: a domain or a device does not exist.
        EmptyPartitionError: a client would have no data.
    """
    from metamoe.common.data.datasets import check_domains, load_domain, load_private, load_public
    from metamoe.simulations.placement import placement_of

    if settings.data.private == "own":
        raise InvalidSettingError("data.private = own is for clients beside their data: metamoe deploy run")
    placement = placement_of(settings, on_ray)
    check_domains(settings.data)
    for split in ("train", "test"):
        load_public(settings.data, split)
    given: Counter[str] = Counter()
    for client in settings.members:
        given[settings.client_domain(client)] += len(load_private(settings, client, "train"))
    for domain in settings.data.domains:
        load_domain(settings.data, domain, "test")
    return replace(placement, warnings=[*placement.warnings, *_left_over(settings, given)])


def _left_over(settings: Settings, given: Mapping[str, int]) -> Iterator[str]:
    """Which domains have classes that were dealt to no client."""
    from metamoe.common.data.datasets import load_domain

    if settings.data.partition.kind == "pathological" and not settings.data.private_samples and not settings.without:
        for domain, count in given.items():
            if rest := len(load_domain(settings.data, domain, "train")) - count:
                yield f"data.partition.kind = pathological leaves {rest:,} training samples of {domain!r} to no client"


def prepare_apart(settings: Settings) -> Placement:
    """The same for a run on Ray, in a process of its own, whose memory the run's processes get.

    It is not one of multiprocessing's, which would import a caller's script again.

    Raises:
        MetaMoEError: what was found there, of the kind it had there.
        RunFailedError: the process ended otherwise.
    """
    done = subprocess.run(
        _APART, input=settings.model_dump_json(), stdout=subprocess.PIPE, text=True, start_new_session=True, check=False
    )
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        raise RunFailedError(f"the process that prepares the data ended with {done.returncode}; it said why above") from None
    if done.returncode:
        raise by_code(found["code"])(found["message"])
    return Placement(**found)


def _main() -> None:
    try:
        found = asdict(prepare(Settings.model_validate_json(sys.stdin.read()), on_ray=True))
    except MetaMoEError as error:
        sys.stdout.write(f"\n{json.dumps({'code': error.exit_code, 'message': str(error)})}\n")
        sys.exit(error.exit_code)
    sys.stdout.write(f"\n{json.dumps(found)}\n")


if __name__ == "__main__":
    _main()
