"""The detours of a mixed batch on a CPU: rows gathered by their adapters.

Rows are brought in the order of their adapters, and each adapter's rows are multiplied with its own
factors. Adapters that lie near each other and have about as many tokens go through one batched
product, padded to the most rows one of them has; one with many tokens gets a product of its own. A
few rows of one token each are multiplied one by one. Every adapter in play is read once, which is
all the memory traffic there has to be:

    X[order] (n, m, in) · A (n, r, in)ᵀ · B (n, r, out)  →  back to the rows they came from
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch

from lora_kit.serve.runs import cheapest_runs
from lora_kit.serve.slots import Page

# What a product costs on a CPU, counted in tokens multiplied: its call, and each slot it reads.
# Adapters of more than so many tokens gain nothing by sharing one. Timed with ranks 8 and 16.
PRODUCT_TOKENS, SLOT_TOKENS, SHARED_TOKENS = 12, 2, 64
NARROW = 3072  # numbers of a slot's input up to which MKL is faster at A Xᵀ than at X Aᵀ
FEW_ROWS = 4  # so many rows of one token are cheaper multiplied one by one than gathered


@dataclass(frozen=True)
class _Part:
    """Slots first..last of a page, `width` rows of each, at start..stop in the gathered order."""

    page: Page
    first: int
    last: int
    width: int
    start: int
    stop: int


@dataclass
class Order:
    """How rows are gathered for the layers of some pages.

    parts: the products; gather: (n,) the row at each place, None where rows stand in order already;
    back: (rows,) the place of each row's product, n for rows without one, of which there are some
    where `bare`. one_by_one: the row of each part, where rows are multiplied each by itself.
    """

    parts: list[_Part]
    gather: torch.Tensor | None
    back: torch.Tensor
    places: int
    bare: bool
    one_by_one: list[int] | None = None


@dataclass(frozen=True)
class Work:
    """What a layer does with these rows: their order, and for each of its parts the factors as the
    product wants them, views into the page.

    Of a part of one slot a is (r, in) and b (r, out), of several both are stacked. To cut the views
    out anew for each token would take longer than to multiply them.
    """

    order: Order
    factors: list[tuple[torch.Tensor, torch.Tensor]]


def add_gathered(batch, pages: list[Page], path: str, site: str, x, out) -> None:
    """out (rows, ..., out_features) += the rows' own detours at a layer, x (rows, ..., in).

    batch: a `products.Batch`; pages: those of it that have the layer.
    """
    rows = len(batch.at)
    tokens = x.numel() // (x.shape[-1] * rows)
    work = batch.works.get((path, tokens))
    if work is None:
        work = batch.works[path, tokens] = _prepare(_order_of(batch, pages, tokens), path)
    order, dtype = work.order, work.factors[0][1].dtype
    if len(order.parts) == 1 and order.gather is None:  # rows stand as the product wants them
        x = x if x.dtype == dtype else x.to(dtype)
        _multiply(*work.factors[0], x, out, add=True)
        return
    if order.one_by_one is not None and x.dtype == out.dtype == dtype:
        lined, flat = x.reshape(rows, -1), out.view(rows, -1)
        for row, (a, b) in zip(order.one_by_one, work.factors, strict=True):
            flat[row].addmv_(b.t(), torch.mv(a, lined[row]))
        return
    key = (site, id(order))
    if batch.seen is not None and batch.seen[0] == key and batch.seen[1] is x:
        some = batch.seen[2]
    else:
        lined = x.reshape(rows, -1)
        some = (lined if order.gather is None else lined.index_select(0, order.gather)).to(dtype)
        batch.seen = (key, x, some)
    flat = out.view(rows, -1)
    shape = (order.places + order.bare, flat.shape[1])
    made = torch.empty(shape, dtype=dtype, device=x.device)
    if order.bare:
        made[-1] = 0
    for part, (a, b) in zip(order.parts, work.factors, strict=True):
        _multiply(a, b, some[part.start : part.stop], made[part.start : part.stop])
    flat.add_(made.index_select(0, order.back))


def _prepare(order: Order, path: str) -> Work:
    factors = []
    for part in order.parts:
        site, number = part.page.place[path]
        a = part.page.a[site][number, part.first : part.last]
        b = part.page.b[path][part.first : part.last]
        factors.append((a[0], b[0]) if part.last - part.first == 1 else (a, b))
    return Work(order, factors)


def _multiply(a, b, x, out: torch.Tensor, add: bool = False) -> None:
    """out = x Aᵀ B, or out += it; x and out hold the rows of a part, in any shape.

    Shapes: a (r, in) and b (r, out), or (slots, r, in) and (slots, r, out).
    """
    in_place = add and out.dtype == b.dtype
    if a.dim() == 2:
        if in_place and x.numel() == a.shape[1]:  # one token: cheaper to call
            out.view(-1).addmv_(b.t(), torch.mv(a, x.reshape(-1)))
            return
        hidden, to = x.reshape(-1, a.shape[1]).mm(a.t()), out.view(-1, b.shape[1])
        product, add_product = torch.mm, to.addmm_
    else:
        x, to = x.reshape(len(a), -1, a.shape[2]), out.view(len(a), -1, b.shape[2])
        if x.shape[1] * x.shape[2] <= NARROW:
            hidden = a.bmm(x.transpose(1, 2)).transpose(1, 2)
        else:
            hidden = x.bmm(a.transpose(1, 2))
        product, add_product = torch.bmm, to.baddbmm_
    if in_place:
        add_product(hidden, b)
    elif add:
        to.add_(product(hidden, b))
    else:
        product(hidden, b, out=to)


def _order_of(batch, pages: list[Page], tokens: int) -> Order:
    key = (tokens, *map(id, pages))
    if key not in batch.orders:
        batch.orders[key] = _line_up(batch, pages, tokens)
    return batch.orders[key]


def _line_up(batch, pages: list[Page], tokens: int) -> Order:
    here = [row for row, at in enumerate(batch.at) if at is not None and at[0] in pages]
    alike = len(here) == len(batch.at) and len(set(batch.at)) == 1  # they stand in order as it is
    one_by_one = here if tokens == 1 and len(here) <= FEW_ROWS and not alike else None
    parts, gather = [], []
    for row in one_by_one or ():
        page, slot = batch.at[row]
        parts.append(_Part(page, slot, slot + 1, 1, len(gather), len(gather) + 1))
        gather.append(row)
    for page in pages if one_by_one is None else ():
        rows: dict[int, list[int]] = {}
        for row in here:
            if batch.at[row][0] is page:
                rows.setdefault(batch.at[row][1], []).append(row)
        for first, last, width in _runs({s: len(r) for s, r in rows.items()}, tokens):
            start = len(gather)
            for slot in range(first, last):
                mine = rows.get(slot, [])
                # What fills a place up is multiplied in vain and read by nobody.
                gather += mine + [rows[first][0]] * (width - len(mine))
            parts.append(_Part(page, first, last, width, start, len(gather)))
    places, standing = len(gather), {}
    for place, row in enumerate(gather):
        standing.setdefault(row, place)  # its own place comes before those it fills up
    back = [standing.get(row, places) for row in range(len(batch.at))]
    back = torch.tensor(back, device=batch.device)
    in_order, bare = gather == list(range(len(batch.at))), len(here) < len(batch.at)
    line = None if in_order else torch.tensor(gather, device=batch.device)
    return Order(parts, line, back, places, bare, one_by_one)


def _runs(rows: dict[int, int], tokens: int) -> list[tuple[int, int, int]]:
    """(first, last, width): the slots first..last-1 that share a product, each with `width` places,
    so that all products together cost least.

    rows: {slot: how many}; tokens: of each row. Over slots without rows a product may go as well.
    """
    slots = sorted(rows)
    counts = [rows[slot] for slot in slots]
    # widest[last][n]: the most rows that one of the n + 1 slots before `last` has
    widest = [list(accumulate(reversed(counts[:last]), max)) for last in range(len(slots) + 1)]

    def cost(first: int, last: int) -> float:
        width = widest[last][last - first - 1] * tokens
        if last - first > 1 and width > SHARED_TOKENS:
            return math.inf
        return PRODUCT_TOKENS + (slots[last - 1] + 1 - slots[first]) * (width + SLOT_TOKENS)

    return [
        (slots[first], slots[last - 1] + 1, max(counts[first:last]))
        for first, last in cheapest_runs(len(slots), cost)
    ]
