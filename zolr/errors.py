"""The errors a user can cause, each with the exit code that the command line returns for it."""

from numbers import Integral, Real
from typing import Any


def cause_of(error: BaseException, most: int = 300) -> str:
    """What an error says as part of a sentence: its lines joined, no full stop, so many characters at most.

    >>> cause_of(ValueError("Validation error for 'heads':\\n    12 is not 4 times 5."))
    "Validation error for 'heads': 12 is not 4 times 5"
    """
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= most else f"{text[: most - 4].rstrip()} ..."


class ZolrError(Exception):
    """Anything zolr refuses on purpose; the message names the thing, the value and the way out."""

    exit_code = 1


class UsageError(ZolrError, ValueError):
    """A setting that does not exist, is out of range or contradicts another one."""

    exit_code = 2


class DataError(ZolrError, ValueError):
    """A data file or data set that cannot be used as it is."""

    exit_code = 3


class StorageError(ZolrError, OSError):
    """A folder or checkpoint that cannot be read, written or trusted."""

    exit_code = 4


class NonFiniteError(ZolrError, ArithmeticError):
    """Training stopped because the loss stayed NaN or infinite."""

    exit_code = 5


class PeerLostError(ZolrError):
    """Another process of a distributed run is gone."""

    exit_code = 6


class PeersDifferError(ZolrError):
    """The processes of a distributed run do not have the same weights."""

    exit_code = 6


class BudgetError(ZolrError):
    """The memory budget cannot be met."""

    exit_code = 7


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a setting is a whole number, numpy's too, of at least so much; True and False are none.

    >>> [is_count(value) for value in (3, 0, 2.0, True)]
    [True, False, False, False]
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def plain(value: Any) -> Any:
    """A setting as it is saved and compared: whole numbers of other packages as Python's own."""
    return int(value) if is_count(value, 0) else value


def check_numbers(**given: Any) -> None:
    """Refuse settings that are no real numbers, by their names; None is left to others.

    >>> check_numbers(lr=1e-3, clip=None)
    """
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise UsageError(f"{name} = {value!r} is no number; use one such as 1e-3")
