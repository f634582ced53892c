"""Where the adapters of a mixed batch lie: side by side in slots, so that one product takes many.

Adapters of one shape (rank, and the layers they sit on) share pages of slots. Within a page the
factors of a layer are one tensor over all slots,

    A (slots, r, in)        B (slots, r, out), transposed and scaled by alpha / r

which a batched product reads as it is. An adapter comes by being copied into a free slot, and goes
by its slot being marked free: nothing of the others moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lora_kit.errors import BadInputError

# Layers that read the same input: their A lie one behind the other, for one product.
SHARED_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


@dataclass(frozen=True)
class Factors:
    """An adapter's numbers as they are used: a {layer path: A (r, in)}, b {path: (s·B)ᵀ (r, out)},
    s = alpha / r."""

    rank: int
    a: Mapping[str, torch.Tensor] = field(repr=False)
    b: Mapping[str, torch.Tensor] = field(repr=False)

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (*self.a.values(), *self.b.values()))

    @property
    def shape(self) -> tuple[int, tuple[str, ...]]:
        return self.rank, tuple(sorted(self.a))


@dataclass(eq=False)
class Page:
    """Slots for adapters of one shape.

    a: {site: (layers of the site, slots, r, in)}; place: {path: (site, its number there)};
    b: {path: (slots, r, out)}. A site is a group of layers that read one input.
    """

    rank: int
    slots: int
    a: dict[str, torch.Tensor]
    b: dict[str, torch.Tensor]
    place: dict[str, tuple[str, int]]
    free: list[int]

    @classmethod
    def like(cls, factors: Factors, slots: int, zeroed: bool = True) -> Page:
        """An empty page for adapters of the shape of this one.

        zeroed: a product over all slots also meets those that nobody has filled. Without it they
        hold whatever lay there, and on a CPU memory that is never written to is never taken.
        """
        sites: dict[str, list[str]] = {}
        for path in factors.a:
            sites.setdefault(site_of(path), []).append(path)
        a, place = {}, {}
        for site, paths in sites.items():
            one = factors.a[paths[0]]
            a[site] = one.new_empty((len(paths), slots, *one.shape))
            place |= {path: (site, i) for i, path in enumerate(paths)}
        b = {path: one.new_empty((slots, *one.shape)) for path, one in factors.b.items()}
        if zeroed:
            torch._foreach_zero_([*a.values(), *b.values()])
        return cls(factors.rank, slots, a, b, place, list(range(slots)))

    def fill(self, slot: int, factors: Factors) -> None:
        """Copy an adapter into a slot."""
        here, there = [], []
        for path, (site, number) in self.place.items():
            here += [self.a[site][number, slot], self.b[path][slot]]
            there += [factors.a[path], factors.b[path]]
        with torch.inference_mode():
            torch._foreach_copy_(here, there)

    def slot(self, path: str, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and (s·B)ᵀ (r, out) of a layer, as they lie there."""
        site, number = self.place[path]
        return self.a[site][number, slot], self.b[path][slot]


class Slots:
    """Adapters by name, in pages.

    page_slots: how many a page takes; zeroed: see `Page.like`.
    """

    def __init__(self, page_slots: int, zeroed: bool = True):
        self.page_slots, self.zeroed = page_slots, zeroed
        self.pages: dict[tuple, list[Page]] = {}
        self.at: dict[str, tuple[Page, int]] = {}

    def put(self, name: str, factors: Factors) -> None:
        """Raises BadInputError where the name is taken."""
        if name in self.at:
            raise BadInputError(f"An adapter named {name!r} is there already.")
        pages = self.pages.setdefault(factors.shape, [])
        page = next((p for p in pages if p.free), None)
        if page is None:
            page = Page.like(factors, self.page_slots, self.zeroed)
            pages.append(page)
        slot = page.free[0]
        page.fill(slot, factors)
        page.free.remove(slot)
        self.at[name] = page, slot

    def drop(self, name: str) -> None:
        """A page whose last adapter goes is given back."""
        page, slot = self.at.pop(name)
        page.free = sorted([*page.free, slot])
        if len(page.free) == page.slots:
            self.pages = {
                shape: kept
                for shape, pages in self.pages.items()
                if (kept := [p for p in pages if p is not page])
            }


def site_of(path: str) -> str:
    """What a layer's input is called: layers that read the same one have the same name."""
    parent, _, leaf = path.rpartition(".")
    shared = next((s for s in SHARED_INPUT if leaf in s), {leaf})
    return f"{parent}:{min(shared)}"
