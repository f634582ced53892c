"""Cutting a sequence into runs that are worked on together, so that all of them cost least.

Working on several together saves calls and pads the smaller ones up to the largest: adapters that
share a product (`products`), prompts that share a pass (`decoder`).
"""

from __future__ import annotations

from collections.abc import Callable


def cheapest_runs(count: int, cost: Callable[[int, int], float]) -> list[tuple[int, int]]:
    """(first, last) of each run, 0..count-1 cut where the sum of cost(first, last) is least.

    cost: of first..last-1 together, infinite where they cannot be.
    """
    # best[last]: the least cost of what lies before, and where its last run begins
    best: list[tuple[float, int]] = [(0, 0)]
    for last in range(1, count + 1):
        best.append(min((best[first][0] + cost(first, last), first) for first in range(last)))
    runs, last = [], count
    while last:
        first = best[last][1]
        runs.append((first, last))
        last = first
    return runs[::-1]
