"""The detours of a mixed batch, in few products. Two ways, by where launching costs more than work.

**Gathered** (CPU). Rows are brought in the order of their adapters, and each adapter's rows are
multiplied with its own factors. Adapters that lie near each other and have about as many tokens go
through one batched product, padded to the most rows one of them has; one with many tokens gets a
product of its own. Every adapter in play is read once, which is all the memory traffic there has to
be:

    X[order] (n, m, in) · A (n, r, in)ᵀ · B (n, r, out)  →  back to the rows they came from

**Masked** (GPU). Every row goes through every slot of a page, and the columns of other slots are
set to zero (set, not multiplied: another adapter's overflow is not this row's):

    H = X [A_1; A_2; …]ᵀ (rows, slots · r)
    H[i, j] = 0  unless column j is of row i's slot
    Y += H [B_1; B_2; …]

work in vain, but three kernels whatever the adapters, where gathering would launch many more; and
layers that read one input share the first. Both give each row the same sum; they differ by its
rounding. Which is faster where: `benchmarks/adapters.py --part products`.

Recorded decoding steps (`serve.graphs`), whose slots are data, have a third where Triton is there:
kernels in which each row reads its own slot (`serve.kernels`). The first product of a site runs
beside the base's own.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from types import ModuleType

import torch

from lora_kit.serve.runs import cheapest_runs
from lora_kit.serve.slots import Page

# What a product costs on a CPU, counted in tokens multiplied: its call, and each slot it reads.
# Adapters of more than so many tokens gain nothing by sharing one. Timed with ranks 8 and 16.
PRODUCT_TOKENS, SLOT_TOKENS, SHARED_TOKENS = 12, 2, 64
NARROW = 3072  # numbers of a slot's input up to which MKL is faster at A Xᵀ than at X Aᵀ
At = tuple[Page, int] | None  # a row's page and slot


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
class _Order:
    """How rows are gathered for the layers of some pages.

    parts: the products; gather: (n,) the row at each place, None where rows stand in order already;
    back: (rows,) the place of each row's product, n for rows without one, of which there are some
    where `bare`.
    """

    parts: list[_Part]
    gather: torch.Tensor | None
    back: torch.Tensor
    places: int
    bare: bool


@dataclass(frozen=True)
class _Work:
    """What a layer does with these rows: their order, and for each of its parts the factors as the
    product wants them, views into the page.

    Of a part of one slot a is (r, in) and b (r, out), of several both are stacked. To cut the views
    out anew for each token would take longer than to multiply them.
    """

    order: _Order
    factors: list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Batch:
    """Whose rows these are, with what was worked out about them.

    by_path, by_site: the pages that have a layer, or one of a site; orders, works, masks: made when
    first wanted; seen: what layers that read one input share, (site, input, gathered rows or first
    products). Of a recorded batch: own, the rows' slots in a page, by its id; kernels,
    `serve.kernels` where it can be had; side, the stream for first products, and waiting, whether
    one runs there.
    """

    at: list[At]
    masked: bool
    device: torch.device
    by_path: dict[str, list[Page]]
    by_site: dict[str, list[Page]]
    orders: dict[tuple, _Order] = field(default_factory=dict)
    works: dict[tuple[str, int], _Work] = field(default_factory=dict)
    masks: dict[tuple, torch.Tensor] = field(default_factory=dict)
    seen: tuple | None = None
    own: dict[int, torch.Tensor] = field(default_factory=dict)
    kernels: ModuleType | None = None
    side: torch.cuda.Stream | None = None
    waiting: bool = False


def plan_batch(at: Sequence[At], masked: bool, device: torch.device) -> Batch:
    """Args: at: each row's page and slot, None for the bare base; masked: see the module."""
    pages: dict[int, Page] = {id(a[0]): a[0] for a in at if a is not None}
    return Batch(list(at), masked, torch.device(device), *_where(pages.values()))


def batch_of_pages(pages: Sequence[Page], slots: torch.Tensor, tokens: int = 1, side=None) -> Batch:
    """A batch whose slots are data: slots (pages, rows) holds each row's slot of each page, -1 for
    none. What is recorded with it serves every choice of slots.

    tokens: of each row; side: a stream for first products.
    """
    batch = Batch([None] * slots.shape[1], True, slots.device, *_where(pages), side=side)
    batch.kernels = own_slot_kernels() if slots.device.type == "cuda" and tokens == 1 else None
    for page, own in zip(pages, slots, strict=True):
        if batch.kernels is None:
            batch.masks[id(page), tokens] = _others(own.repeat_interleave(tokens), page.slots)
        else:
            batch.own[id(page)] = own
    return batch


@functools.cache
def own_slot_kernels() -> ModuleType | None:
    """`serve.kernels` where they run: Triton, its compiler and a GPU are there. Ask before anything
    is recorded."""
    try:
        kernels = importlib.import_module("lora_kit.serve.kernels")
        kernels.try_out()
    except Exception:  # whatever is missing, the masked products do as well, more slowly
        return None
    return kernels


def _where(pages: Iterable[Page]) -> tuple[dict[str, list[Page]], dict[str, list[Page]]]:
    by_path: dict[str, list[Page]] = {}
    by_site: dict[str, list[Page]] = {}
    for page in pages:
        for path in page.place:
            by_path.setdefault(path, []).append(page)
        for site in page.a:
            by_site.setdefault(site, []).append(page)
    return by_path, by_site


def add_detour(batch: Batch, path: str, site: str, x: torch.Tensor, out: torch.Tensor):
    """out + the rows' own detours at a layer; out itself where it may be written to.

    x (rows, ..., in), out (rows, ..., out_features).
    """
    pages = batch.by_path.get(path)
    if pages is None:
        return None
    if torch.is_grad_enabled():  # a decorator would enter no_grad for every layer of every token
        with torch.no_grad():
            return add_detour(batch, path, site, x, out)
    if out.requires_grad or not out.is_contiguous():
        out = out.clone()
    if batch.kernels is not None:
        _of_own_slots(batch, pages, {path: slice(None)}, site, x, out)
    else:
        product = _masked if batch.masked else _gathered
        product(batch, pages, path, site, x, out)
    return out


def add_detours(
    batch: Batch, columns: Mapping[str, slice], site: str, x: torch.Tensor, out: torch.Tensor
) -> None:
    """Add the rows' own detours at all layers of a site to what they answered side by side.

    columns: {path: its columns of out}; x (rows, ..., in), out (rows, ..., columns), contiguous.
    Without gradients, and not for products that are gathered.
    """
    if batch.kernels is not None:
        _of_own_slots(batch, batch.by_site.get(site, []), columns, site, x, out)
        return
    for path, part in columns.items():
        _masked(batch, batch.by_path.get(path, []), path, site, x, out[..., part])


# ---------------------------------------------------------------------- gathered
def _gathered(batch: Batch, pages: list[Page], path: str, site: str, x, out) -> None:
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


def _prepare(order: _Order, path: str) -> _Work:
    factors = []
    for part in order.parts:
        site, number = part.page.place[path]
        a = part.page.a[site][number, part.first : part.last]
        b = part.page.b[path][part.first : part.last]
        factors.append((a[0], b[0]) if part.last - part.first == 1 else (a, b))
    return _Work(order, factors)


def _multiply(a, b, x, out: torch.Tensor, add: bool = False) -> None:
    """out = x Aᵀ B, or out += it; x and out hold the rows of a part, in any shape.

    Shapes: a (r, in) and b (r, out), or (slots, r, in) and (slots, r, out).
    """
    add_in_place = add and out.dtype == b.dtype
    if a.dim() == 2:
        if add_in_place and x.numel() == a.shape[1]:  # one token: cheaper to call
            out.view(-1).addmv_(b.t(), torch.mv(a, x.reshape(-1)))
            return
        hidden, to = x.reshape(-1, a.shape[1]).mm(a.t()), out.view(-1, b.shape[1])
        if add_in_place:
            to.addmm_(hidden, b)
        elif add:
            to.add_(hidden.mm(b))
        else:
            torch.mm(hidden, b, out=to)
        return
    x = x.reshape(len(a), -1, a.shape[2])
    if (
        x.shape[1] <= 2
    ):  # the same product the other way round: MKL is faster at it, while so narrow
        hidden = a.bmm(x.transpose(1, 2)).transpose(1, 2)
    else:
        hidden = x.bmm(a.transpose(1, 2))
    to = out.view(len(a), -1, b.shape[2])
    if add_in_place:
        to.baddbmm_(hidden, b)
    elif add:
        to.add_(hidden.bmm(b))
    else:
        torch.bmm(hidden, b, out=to)


def _order_of(batch: Batch, pages: list[Page], tokens: int) -> _Order:
    key = (tokens, *map(id, pages))
    if key not in batch.orders:
        batch.orders[key] = _line_up(batch, pages, tokens)
    return batch.orders[key]


def _line_up(batch: Batch, pages: list[Page], tokens: int) -> _Order:
    parts, gather, back = [], [], [-1] * len(batch.at)
    for page in pages:
        rows: dict[int, list[int]] = {}
        for row, at in enumerate(batch.at):
            if at is not None and at[0] is page:
                rows.setdefault(at[1], []).append(row)
        for first, last, width in _runs({s: len(r) for s, r in rows.items()}, tokens):
            start = len(gather)
            for slot in range(first, last):
                mine = rows.get(slot, [])
                for row in mine:
                    back[row] = len(gather)
                    gather.append(row)
                # What fills a place up is multiplied in vain and read by nobody.
                gather += [rows[first][0]] * (width - len(mine))
            parts.append(_Part(page, first, last, width, start, len(gather)))
    places = len(gather)
    as_they_are, bare = gather == list(range(len(batch.at))), min(back) < 0
    back = torch.tensor([places if b < 0 else b for b in back], device=batch.device)
    line = None if as_they_are else torch.tensor(gather, device=batch.device)
    return _Order(parts, line, back, places, bare)


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


# ---------------------------------------------------------------------- masked
def _masked(batch: Batch, pages: list[Page], path: str, site: str, x, out) -> None:
    if batch.seen is None or batch.seen[0] != site or batch.seen[1] is not x:
        batch.seen = (site, x, {})
    wide = out.view(-1, out.shape[-1])
    for page in pages:
        hidden = batch.seen[2].get(id(page))
        if hidden is None:
            hidden = _hidden(batch, page, site, x.reshape(-1, x.shape[-1]))
            batch.seen[2][id(page)] = hidden
        _, number = page.place[path]
        columns = page.slots * page.rank
        mine = hidden[:, number * columns : (number + 1) * columns]
        b = page.b[path].view(columns, -1)
        if wide.dtype == b.dtype:
            wide.addmm_(mine, b)
        else:
            wide.add_(mine.mm(b))


def _hidden(batch: Batch, page: Page, site: str, flat: torch.Tensor) -> torch.Tensor:
    """(tokens, layers of the site · slots · r), zero but in the token's own slot."""
    a = page.a[site]
    layers, slots, rank, width = a.shape
    hidden = flat.to(a.dtype).mm(a.view(-1, width).t())
    each = len(flat) // len(batch.at)
    key = (id(page), each)
    if key not in batch.masks:
        own = [-1 if at is None or at[0] is not page else at[1] for at in batch.at]
        mine = torch.tensor(own, device=batch.device).repeat_interleave(each)
        batch.masks[key] = _others(mine, slots)
    hidden.view(len(flat), layers, slots, rank).masked_fill_(batch.masks[key], 0)
    return hidden


def _others(own: torch.Tensor, slots: int) -> torch.Tensor:
    """(tokens, 1, slots, 1), True for the slots that are not a token's own (tokens,)."""
    return (own[:, None] != torch.arange(slots, device=own.device))[:, None, :, None]


# ---------------------------------------------------------------------- own slots
def begin_detour(batch: Batch, site: str, x: torch.Tensor) -> None:
    """Before a layer's own product: let the first products of its site run beside it."""
    pages = batch.by_site.get(site)
    if batch.kernels is None or pages is None:
        return
    if batch.seen is None or batch.seen[0] != site or batch.seen[1] is not x:
        batch.seen = (site, x, {})
    missing = [page for page in pages if id(page) not in batch.seen[2]]
    if not missing:
        return
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if batch.side is not None:
        batch.side.wait_stream(torch.cuda.current_stream())
        batch.waiting = True
    with torch.cuda.stream(batch.side):  # None: where we are
        for page in missing:
            own = batch.own[id(page)]
            batch.seen[2][id(page)] = batch.kernels.first_products(flat, page.a[site], own)


def join(batch: Batch) -> None:
    """Wait for what runs beside."""
    if batch.waiting:
        torch.cuda.current_stream().wait_stream(batch.side)
        batch.waiting = False


def _of_own_slots(
    batch: Batch, pages: list[Page], columns: Mapping[str, slice], site: str, x, out
) -> None:
    """columns: {path: its columns of out}."""
    begin_detour(batch, site, x)
    join(batch)
    wide = out.view(-1, out.shape[-1])
    for page in pages:
        at = sorted((page.place[path][1], path) for path in columns if path in page.place)
        batch.kernels.add_second_products(
            batch.seen[2][id(page)][:, at[0][0] :],
            [page.b[path] for _, path in at],
            batch.own[id(page)],
            wide,
            [columns[path].start or 0 for _, path in at],
        )
