"""Data sets from a hub."""

from datasets import DatasetDict, load_dataset

from metamoe.common.hub import HUB_FAILURES, hub_error

# Where the hub keeps its own conversion of a data set that is published as a script.
_CONVERTED = "refs/convert/parquet"


def hub_name(hub: str) -> str:
    """The id alone, without configuration and revision."""
    return hub.partition("@")[0].partition(":")[0]


def load_from_hub(hub: str) -> DatasetDict:
    """All parts of a data set.

    Args:
        hub: its id, after a colon its configuration, and after an @ a revision: "allenai/ai2_arc:ARC-Easy@main".

    Raises:
        HubError: the hub does not give it.
    """
    rest, _, revision = hub.partition("@")
    name, configuration = hub_name(hub), rest.partition(":")[2]
    try:
        try:
            return load_dataset(name, configuration or None, revision=revision or None)
        except RuntimeError as error:
            # Scripts are not run any more, for good reasons.
            if revision or "script" not in str(error):
                raise
            return load_dataset(name, configuration or None, revision=_CONVERTED)
    except HUB_FAILURES as error:
        raise hub_error("data.hub", hub, error) from error
