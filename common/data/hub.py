"""Data sets from a hub."""

from datasets import DatasetDict, load_dataset

from metamoe.common.hub import HUB_FAILURES, hub_error

# Where the hub keeps its own conversion of a data set that is published as a script.
_CONVERTED = "refs/convert/parquet"


def load_from_hub(hub: str) -> DatasetDict:
    """All parts of a data set.

    Raises:
        HubError: the hub does not give it.
    """
    try:
        try:
            return load_dataset(hub)
        except RuntimeError as error:
            # Scripts are not run any more, for good reasons.
            if "script" not in str(error):
                raise
            return load_dataset(hub, revision=_CONVERTED)
    except HUB_FAILURES as error:
        raise hub_error("data.hub", hub, error) from error
