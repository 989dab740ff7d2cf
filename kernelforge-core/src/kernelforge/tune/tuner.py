"""What a search strategy implements. A strategy only proposes configs; measuring and keeping them is not its
business."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from kernelforge.variant import Config


@runtime_checkable
class Tuner(Protocol):
    """A search over one variant's config space for one problem.

    A tuner is a class that is made with `(space, default, *, trials, seed)`: the `ConfigSpace`, the variant's own
    choice in it, how many configs will be tried at most, and the seed of any randomness. Several configs may be asked
    for before the first is told.
    """

    def ask(self) -> Config | None:
        """The next config to try, never one twice; None when the search is over."""
        ...

    def tell(self, config: Config, median_s: float | None) -> None:
        """The median seconds of a config; None when it failed."""
        ...
