"""What a hub of models and data sets does not give, and what to do about it."""

import re

from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError

from metamoe.common.errors import HubError

HUB_FAILURES = (OSError, ValueError, RuntimeError, HTTPError)
"""What libraries raise when a hub does not give what is asked for."""


OFFLINE = "OfflineModeIsEnabled"
"""What is in their messages when a variable keeps them from asking."""


def _is_missing(error: BaseException) -> bool:
    answered = isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code in (401, 404)
    # The data sets' library says so in words alone.
    return answered or "doesn't exist" in str(error)


def hub_error(setting: str, reference: str, error: Exception) -> HubError:
    """What to tell a user whose model or data set the hub did not give."""
    causes = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(c, GatedRepoError) for c in causes) or re.search(r"\bgated (dataset|repo)", str(error)):
        remedy = "it is gated: accept its licence on the hub, and log in with 'hf auth login' or the variable HF_TOKEN"
    elif OFFLINE in str(error):
        remedy = "HF_HUB_OFFLINE is set, and the cache does not have it: unset it once, or give a folder in place of the hub id"
    elif any(map(_is_missing, causes)):
        remedy = "the hub has no such name, or not for you: check the spelling, or log in with 'hf auth login'"
    elif setting == "push":
        remedy = "the hub cannot be reached from here: the folder is whole, so copy it to where it can be, and push it there"
    else:
        remedy = "the hub cannot be reached from here: download it elsewhere, and give the folder in place of the hub id"
    return HubError(f"{setting} = {reference!r}: {remedy} ({type(error).__name__}: {str(error).splitlines()[0]})")
