"""Before a simulation: everything that can be found missing or empty is found now, not after minutes."""

import json
import subprocess
import sys

from metamoe.common.config import Settings
from metamoe.common.errors import InvalidSettingError, MetaMoEError, RunFailedError, by_code

_APART = (sys.executable, "-P", "-m", "metamoe.simulations.prepare")


def prepare(settings: Settings) -> None:
    """Make or open every data set of a run once, so that its processes find them in the cache.

    Raises:
        InvalidSettingError: a domain does not exist.
        EmptyPartitionError: a client would have no data.
    """
    from metamoe.common.data.datasets import check_domains, load_domain, load_private, load_public

    if settings.data.private == "own":
        raise InvalidSettingError("data.private = own is for clients beside their data: metamoe deploy run")
    check_domains(settings.data)
    for split in ("train", "test"):
        load_public(settings.data, split)
    for client in range(settings.clients):
        load_private(settings, client, "train")
    for domain in settings.data.domains:
        load_domain(settings.data, domain, "test")


def prepare_apart(settings: Settings) -> None:
    """The same in a process of its own, whose memory a run's processes get.

    It is not one of multiprocessing's, which would import a caller's script again.

    Raises:
        MetaMoEError: what was found there, of the kind it had there.
        RunFailedError: the process ended otherwise.
    """
    done = subprocess.run(
        _APART, input=settings.model_dump_json(), stdout=subprocess.PIPE, text=True, start_new_session=True, check=False
    )
    if done.returncode == 0:
        return
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        raise RunFailedError(f"the process that prepares the data ended with {done.returncode}; it said why above") from None
    raise by_code(found["code"])(found["message"])


def _main() -> None:
    try:
        prepare(Settings.model_validate_json(sys.stdin.read()))
    except MetaMoEError as error:
        sys.stdout.write(f"\n{json.dumps({'code': error.exit_code, 'message': str(error)})}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    _main()
