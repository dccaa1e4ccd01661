"""Undo: what a step overwrites of each weight, by part, until the step is sure."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from zolr.aside import Aside, Number, Place, Scalar, fresh, gathered, unseen
from zolr.errors import StorageError

Parts = Callable[[str], Any]  # a part of a weight's state by its name: tensors, numbers and strings


class Undo:
    """Parts of the state of weights as they were before a step first wrote them (see `zolr.aside`).

    Args:
        wanted: True: what cannot be kept ends the step; None: it is kept where possible; False: nothing is.

    Attributes:
        old: by weight and part, of this step; a number for every tensor.
    """

    def __init__(self, wanted: bool | None) -> None:
        self.wanted = wanted
        self.old: dict[str, dict[str, Any]] = {}
        self._places: list[Place] = []  # of the tensors, by their numbers
        self._aside = None if wanted is False else Aside()
        self._told = False  # that nothing can be kept

    @property
    def keeps(self) -> bool:
        """Whether anything is kept in this step."""
        return self._aside is not None and self._aside.open and not self._aside.failed

    @property
    def returns(self) -> bool:
        """Whether all that the step has overwritten is kept."""
        return self._aside is not None and not self._aside.failed

    def begin(self) -> None:
        """A step begins."""
        self.old, self._places = {}, []
        if self._aside is not None:
            self._aside.begin()

    def end(self) -> None:
        """The step is sure, or undone."""
        self.old, self._places = {}, []
        if self._aside is not None:
            self._aside.end()

    def give_up(self, why: str) -> None:
        """Keep nothing more in this step, and do not go back to what is kept."""
        if self._aside is not None:
            self._aside.failed = why

    def keep(self, weights: Mapping[str, Parts], parts: Sequence[str]) -> None:
        """Keep parts of weights that are about to be written, where this step has not written them before.

        Raises:
            StorageError: there is no room, and `wanted` is True.
        """
        if not self.keeps:
            return
        assert self._aside is not None
        new: dict[str, dict[str, Any]] = {}
        tensors: list[Tensor] = []
        try:
            with unseen():
                for name, part in weights.items():
                    there = self.old.get(name, {})
                    new[name] = {
                        each: gathered(part(each), tensors, len(self._places))
                        for each in parts
                        if each not in there
                    }
                self._places += self._aside.put(tensors)
            for name, found in new.items():
                self.old.setdefault(name, {}).update(found)
        except (OSError, RuntimeError) as error:
            self._aside.failed = str(error)
            if self.wanted:
                raise StorageError(
                    f"cannot keep the weights of a step aside: {error}; make room in the folder that TMPDIR names, or leave "
                    "undo out"
                ) from error
            if not self._told:
                self._told = True
                warnings.warn(
                    f"weights cannot be kept aside while a step lasts ({error}): one that raises may leave them between "
                    "two steps; make room in the folder that TMPDIR names",
                    stacklevel=5,
                )

    def into(self, old: Number | Scalar, tensor: Tensor) -> None:
        """Give a tensor the bytes that are kept of it."""
        assert self._aside is not None
        if isinstance(old, Scalar):
            tensor.fill_(old.value)
        else:
            self._aside.into(self._places[old], tensor)

    def fresh(self, state: Any, alive: Any = None) -> Any:
        """A kept state, in the tensors of `alive` where they look alike."""
        assert self._aside is not None
        return fresh(self._aside, self._places, state, alive)
