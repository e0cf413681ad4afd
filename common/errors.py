"""The errors a user or an operator can meet, each with its own exit code.

The same code, and never the text, is what a failing client sends (``client/egress.py``): an exception's message may quote
private data.
"""

from pydantic import ValidationError


class MetaMoEError(Exception):
    """Base of every error that this product raises on purpose."""

    exit_code = 1


class InvalidSettingError(MetaMoEError):
    """A setting has a value that is not allowed, or contradicts another one."""

    exit_code = 10


class UnknownSettingError(MetaMoEError):
    """A setting that does not exist."""

    exit_code = 11


class PresetNotFoundError(MetaMoEError):
    """No preset has this name and no file has this path."""

    exit_code = 12


class ProxyCountError(InvalidSettingError):
    """More proxies are asked for than there are candidates."""

    exit_code = 13


class InputFileError(MetaMoEError):
    """A file given by the user cannot be read as what it should be."""

    exit_code = 14


class HubError(MetaMoEError):
    """A model or data set that a hub does not give: it is out of reach, has no such name, or wants a licence accepted."""

    exit_code = 15


class DataFormatError(MetaMoEError):
    """Data without the columns, the labels or the form that a task needs."""

    exit_code = 16


class EmptyPartitionError(MetaMoEError):
    """A client has no training data."""

    exit_code = 20


class PublicDataMismatchError(MetaMoEError):
    """Client and server hold different public sets."""

    exit_code = 21


class SeedMismatchError(MetaMoEError):
    """Client and server, or a unified model and its reader, hold different seed models."""

    exit_code = 22


class ModelStructureError(MetaMoEError):
    """A seed model whose feed-forward sublayers cannot be found."""

    exit_code = 23


class PrivateDataError(MetaMoEError):
    """A client's own data that cannot be used, or not in this run."""

    exit_code = 24


class ProtocolError(MetaMoEError):
    """A message that is not exactly what was declared: name, dtype, shape, finiteness, or protocol version."""

    exit_code = 30


class VersionMismatchError(ProtocolError):
    """Client and server run different versions of MetaMoE-FL."""

    exit_code = 31


class ModelFileError(MetaMoEError):
    """A unified model on disk that is incomplete, changed, or of another format."""

    exit_code = 40


class StateFileError(MetaMoEError):
    """What a run or a client left on disk to go on from is missing, damaged, or of another run."""

    exit_code = 41


class RunFailedError(MetaMoEError):
    """A federated run that did not come to its end."""

    exit_code = 50


class NotEnoughMemoryError(MetaMoEError):
    """A device has not memory for what cannot be made smaller: one sample."""

    exit_code = 51


class PolicyError(MetaMoEError):
    """A client's policy does not allow what a run asks for, or what was about to be sent."""

    exit_code = 60


class BudgetError(MetaMoEError):
    """A run would spend more differential privacy than a client's policy allows, or release without any what needs it."""

    exit_code = 61


class LedgerError(MetaMoEError):
    """A client cannot write down what it is about to send, so it sends nothing."""

    exit_code = 62


def by_code(code: int) -> type[MetaMoEError]:
    """The error type of an exit code; the base type if there is none."""
    return next((kind for kind in all_errors() if kind.exit_code == code), MetaMoEError)


def all_errors() -> list[type[MetaMoEError]]:
    """Every kind of error, the base type first."""
    types = [MetaMoEError]
    for kind in types:
        types.extend(kind.__subclasses__())
    return types


def first_problem(error: ValidationError) -> str:
    """The first thing wrong with a file's contents: where, and what."""
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
