"""zolr: gradient estimation in random subspaces, one engine for every paradigm."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zolr.engine import Engine, Info
    from zolr.estimators import ESTIMATORS
    from zolr.keys import Key
    from zolr.methods import METHODS, Method, Row, compose
    from zolr.optim import OPTIMIZERS, OptimizerRule
    from zolr.projectors import PROJECTORS
    from zolr.residuals import RESIDUALS
    from zolr.subspaces import Full, Left, Right, Subspace, TwoSided
    from zolr.transports import TRANSPORTS

__version__ = "0.1.0"

_HOMES = {
    "Engine": "engine",
    "Info": "engine",
    "ESTIMATORS": "estimators",
    "Key": "keys",
    "METHODS": "methods",
    "Method": "methods",
    "Row": "methods",
    "compose": "methods",
    "OPTIMIZERS": "optim",
    "OptimizerRule": "optim",
    "PROJECTORS": "projectors",
    "RESIDUALS": "residuals",
    "Full": "subspaces",
    "Left": "subspaces",
    "Right": "subspaces",
    "Subspace": "subspaces",
    "TwoSided": "subspaces",
    "TRANSPORTS": "transports",
}

__all__ = [
    "ESTIMATORS",
    "Engine",
    "Full",
    "Info",
    "Key",
    "Left",
    "METHODS",
    "Method",
    "OPTIMIZERS",
    "OptimizerRule",
    "PROJECTORS",
    "RESIDUALS",
    "Right",
    "Row",
    "Subspace",
    "TRANSPORTS",
    "TwoSided",
    "compose",
    "__version__",
]


def __dir__() -> list[str]:
    """The public names, which are imported when they are asked for."""
    return [*__all__]


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for, so that the command line answers without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'zolr' has no attribute '{name}'")
    return getattr(import_module(f"zolr.{_HOMES[name]}"), name)
