"""Before a simulation: everything that can be found missing or empty is found now, not after minutes."""

from metamoe.common.config import Settings
from metamoe.common.errors import InvalidSettingError
from metamoe.common.loading import loading


def prepare(settings: Settings) -> None:
    """Make or open every data set of a run once, so that its processes find them in the cache.

    Raises:
        InvalidSettingError: a domain does not exist.
        EmptyPartitionError: a client would have no data.
    """
    if settings.data.private == "own":
        raise InvalidSettingError("data.private = own is for clients beside their data: metamoe deploy run")
    with loading():
        from metamoe.common.data.datasets import check_domains, load_domain, load_private, load_public

    check_domains(settings.data)
    for split in ("train", "test"):
        load_public(settings.data, split)
    for client in range(settings.clients):
        load_private(settings, client, "train")
    for domain in settings.data.domains:
        load_domain(settings.data, domain, "test")
