"""The detours of a mixed batch, in few products. Two ways, by where launching costs more than work.

**Gathered** (CPU, `gathered`). Rows are brought in the order of their adapters, and each adapter's
rows are multiplied with its own factors.

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch

from lora_kit.serve.gathered import Order, Work, add_gathered
from lora_kit.serve.slots import Page

At = tuple[Page, int] | None  # a row's page and slot


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
    orders: dict[tuple, Order] = field(default_factory=dict)
    works: dict[tuple[str, int], Work] = field(default_factory=dict)
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
        product = _masked if batch.masked else add_gathered
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
