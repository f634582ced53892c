"""What requests share, and how to lay them out so that a model reads it once.

A request asks for the log-likelihood of a continuation after a context. Three things are shared:

- the context of several continuations (HellaSwag's four endings): an `Item` holds the context, the
  *trunk*, once, and the continuations as *branches* behind it;
- the beginning of many contexts (a subject's five worked examples in MMLU): a `Run` holds that
  prefix once, and the model's keys and values of it serve all its rows;
- the forward pass of short items: a `Row` packs several, side by side, up to a number of tokens.

In a row, token i may see token j ≤ i where both have the same trunk number and j is of the trunk
(branch 0) or of i's own branch; and the run's prefix. A token's position is its depth, as if its
request stood alone. This is tree attention (Miao et al. 2024, SpecInfer, section 4) used for
scoring. Here is arithmetic on integers only; `fast_model` runs the model.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BRANCH_TOKENS = 1024  # of one item: attention within a row grows with its square


@dataclass(frozen=True)
class Item:
    """A context and the continuations asked after it; `requests` are their numbers."""

    context: np.ndarray
    continuations: tuple[np.ndarray, ...]
    requests: tuple[int, ...]

    def length(self, start: int = 0) -> int:
        """Tokens the model reads, from `start` of the context on.

        Of a continuation it reads all but the last token, which is only predicted.
        """
        return len(self.context) - start + sum(len(c) - 1 for c in self.continuations)


@dataclass(frozen=True)
class Row:
    """Items side by side, as arrays over the row's tokens, and what is asked of them.

    tokens, positions, trunks, branches: (length,). at, target, request: (asked,): the logits at
    row position `at` predict token `target`, which counts towards the request.
    """

    tokens: np.ndarray
    positions: np.ndarray
    trunks: np.ndarray
    branches: np.ndarray
    at: np.ndarray
    target: np.ndarray
    request: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_plain(self) -> bool:
        """Whether ordinary causal attention will do: one item, one branch."""
        return not self.trunks.any() and self.branches.max(initial=0) <= 1


@dataclass(frozen=True)
class Run:
    """Rows that begin with the same `prefix` (empty: they share nothing), longest first."""

    prefix: np.ndarray
    rows: tuple[Row, ...]


def plan_runs(
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    max_length: int,
    row_tokens: int,
    run_cost: int,
) -> list[Run]:
    """Lay requests out.

    Args:
        requests: (context, continuation) token ids, neither empty.
        max_length: the model's context; what is longer loses its beginning, as in lm-eval: the
            last max_length + 1 tokens are kept, and the very last is only predicted.
        row_tokens: pack items into rows of at most so many tokens (a longer item has its own).
        run_cost: tokens a run of its own must save: what an extra forward pass costs.

    Returns:
        The runs; every request stands in exactly one row.
    """
    items = sorted(_items(requests, max_length), key=lambda item: item.context.tobytes())
    runs = []
    alone: list[Item] = []
    covered = 0
    for low, high, depth in shared_runs(_common(items), run_cost):
        alone += items[covered:low]
        runs.append(_run(items[low:high], depth, row_tokens))
        covered = high
    alone += items[covered:]
    if alone:
        runs.append(_run(alone, 0, row_tokens))
    return runs


def shared_runs(common: Sequence[int], run_cost: int) -> list[tuple[int, int, int]]:
    """Which neighbours to read behind one prefix.

    n neighbours [low, high) with a common prefix of d tokens save (n − 1)·d − run_cost tokens. An
    interval that cannot grow without losing depth is a node of a tree (Abouelhoda et al. 2004);
    from the leaves up, a node is used whole, or its parts are, whichever saves more.

    Args:
        common: the common prefix of each sorted neighbour with the next, n − 1 numbers.
        run_cost: see `plan_runs`.

    Returns:
        Disjoint (low, high, depth) in order.
    """
    # A node: [depth, low, saved by its parts, those parts].
    stack: list[list] = [[0, 0, 0, []]]
    for i in range(1, len(common) + 2):
        depth = common[i - 1] if i <= len(common) else 0
        low, inner = i - 1, None
        while stack[-1][0] > depth:
            node = stack.pop()
            if inner is not None:
                _adopt(node, inner)
            d, low, parts_save, _ = node
            whole = (i - low - 1) * d - run_cost
            inner = (whole, [(low, i, d)]) if whole > max(0, parts_save) else tuple(node[2:])
            if stack[-1][0] >= depth:
                _adopt(stack[-1], inner)
                inner = None
        if stack[-1][0] < depth:
            stack.append([depth, low, 0, []])
        if inner is not None:
            _adopt(stack[-1], inner)
    return sorted(stack[0][3])


def _adopt(node: list, inner: tuple[int, list]) -> None:
    saved, runs = inner
    node[2] += saved
    node[3] += runs


def _items(requests, max_length: int) -> list[Item]:
    """Requests by context, cut as lm-eval cuts them."""
    groups: dict[bytes, tuple[np.ndarray, list[tuple[int, np.ndarray]]]] = {}
    last: tuple[object, np.ndarray, bytes] | None = None
    for number, (context, continuation) in enumerate(requests):
        continuation = np.asarray(continuation, dtype=np.int32)
        keep = max_length + 1 - len(continuation)
        if len(context) > keep:
            whole = np.asarray(context[len(context) - keep :], dtype=np.int32)
            key = whole.tobytes()
        elif last is not None and last[0] is context:  # the same list: its endings follow on it
            _, whole, key = last
        else:
            whole = np.asarray(context, dtype=np.int32)
            key = whole.tobytes()
            last = context, whole, key
        groups.setdefault(key, (whole, []))[1].append((number, continuation))
    made = []
    for context, asked in groups.values():
        start, tokens = 0, 0
        for end, (_, continuation) in enumerate(asked):
            if end > start and tokens + len(continuation) > BRANCH_TOKENS:
                made.append(_item(context, asked[start:end]))
                start, tokens = end, 0
            tokens += len(continuation)
        made.append(_item(context, asked[start:]))
    return made


def _item(context: np.ndarray, asked: list[tuple[int, np.ndarray]]) -> Item:
    return Item(context, tuple(c for _, c in asked), tuple(n for n, _ in asked))


def _common(items: Sequence[Item]) -> list[int]:
    """Tokens each item's context shares with the next; the last token is never shared, because
    the logits at it are asked for."""
    found = []
    for a, b in itertools.pairwise(items):
        x, y = a.context, b.context
        most = min(len(x), len(y)) - 1
        differ = np.flatnonzero(x[:most] != y[:most])
        found.append(int(differ[0]) if len(differ) else most)
    return found


def _run(items: Sequence[Item], depth: int, row_tokens: int) -> Run:
    """Pack items into rows: longest first, each into the fullest row that still takes it."""
    order = sorted(items, key=lambda item: -item.length(depth))
    rows: list[list[Item]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for item in order:
        need = item.length(depth)
        at = bisect.bisect_left(room, (need, -1))
        if at < len(room):
            free, row = room.pop(at)
            rows[row].append(item)
        else:
            free, row = row_tokens, len(rows)
            rows.append([item])
        if free > need:
            bisect.insort(room, (free - need, row))
    laid = sorted((_row(row, depth) for row in rows), key=len, reverse=True)
    return Run(items[0].context[:depth], tuple(laid))


def _row(items: Sequence[Item], depth: int) -> Row:
    tokens, positions, trunks, branches = [], [], [], []
    at, target, request = [], [], []
    length = 0
    for trunk, item in enumerate(items):
        context = item.context[depth:]
        pieces = [context] + [c[:-1] for c in item.continuations]
        end = len(item.context)
        trunk_end = length + len(context)
        begin = trunk_end
        for c, number in zip(item.continuations, item.requests, strict=True):
            # The trunk's last logits predict a continuation's first token, its own the others.
            at += [trunk_end - 1, *range(begin, begin + len(c) - 1)]
            begin += len(c) - 1
            target.append(c)
            request += [number] * len(c)
        tokens += pieces
        positions.append(np.arange(depth, end))
        positions += [np.arange(end, end + len(p)) for p in pieces[1:]]
        branches += [np.full(len(p), k) for k, p in enumerate(pieces)]
        length = begin
        trunks.append(np.full(length - trunk_end + len(context), trunk))
    return Row(
        tokens=np.concatenate(tokens),
        positions=np.concatenate(positions),
        trunks=np.concatenate(trunks),
        branches=np.concatenate(branches),
        at=np.asarray(at),
        target=np.concatenate(target),
        request=np.asarray(request),
    )
