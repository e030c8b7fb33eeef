"""Indices in groups of unlike sizes, as arrays that many processes can map: what belongs to whom."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Groups:
    """Groups of indices, one behind the other; `groups[3]` is the fourth, `len(groups)` how many there are.

    Attributes:
        members: `(members,)` all of them.
        starts: `(groups + 1,)` where in `members` each group starts; the last number is where the last group ends.
    """

    members: Indices
    starts: Indices

    @classmethod
    def of(cls, groups: Iterable[Sequence[int]]) -> Groups:
        """The same groups as arrays."""
        listed = list(groups)
        starts = np.cumsum([0, *map(len, listed)])
        return cls(np.fromiter((member for group in listed for member in group), np.int64, starts[-1]), starts)

    @classmethod
    def by_label(cls, labels: Indices, count: int) -> Groups:
        """The places of each label from 0 to `count` − 1 in `(n,)` labels, in their order."""
        starts = np.concatenate([[0], np.cumsum(np.bincount(labels, minlength=count))])
        return cls(np.argsort(labels, kind="stable"), starts)

    @property
    def sizes(self) -> Indices:
        """`(groups,)` members of each."""
        return np.diff(self.starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[Indices]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Indices:
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} groups, numbered from 0; there is no {index}.")
        return self.members[self.starts[index] : self.starts[index + 1]]


def connected(count: int, first: Indices, second: Indices) -> Indices:
    """Which of `count` things hang together, directly or through others.

    Args:
        first, second: `(links,)` the two ends of every link.

    Returns: `(count,)` numbers from 0; the same for things that are connected.
    """
    roots = np.arange(count)
    while (unlike := roots[first] != roots[second]).any():
        one, other = roots[first[unlike]], roots[second[unlike]]
        np.minimum.at(roots, np.maximum(one, other), np.minimum(one, other))
        while (roots[roots] != roots).any():
            roots = roots[roots]
    return np.unique(roots, return_inverse=True)[1]
