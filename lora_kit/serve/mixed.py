"""Mixed batches: every row of a batch with an adapter of its own, or with none.

The base's product is one for all rows. The detours are not: row i wants s·B A x with the A and B of
its own adapter g(i). A layer gets them all in two products and a mask,

    H = X [A_1; A_2; …]ᵀ                 (rows, r_1 + r_2 + …), every row through every A
    H[i, j] = 0  unless column j is of adapter g(i)
    Y = X Wᵀ + H [s_1 B_1, s_2 B_2, …]ᵀ

which reads every adapter once, however many rows use it, takes ranks as they come without padding,
and has three kernel calls whatever the number of adapters. The columns of other adapters are work
done in vain: 2·(r_1 + r_2 + …)·(in + out) operations a token, nothing beside reading W when a row
is one token, and too much for long prompts. There the rows of each adapter are multiplied apart
(`grouped`). Layers that read the same input (q, k and v; gate and up) share the first product.

The products hang on the base's layers as forward hooks: the model itself, dense or in 4 bits, is
left as it is, and outside `rows(...)` it answers as the bare base.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from lora_kit.errors import BadInputError, unknown_name
from lora_kit.fingerprint import fingerprint_model
from lora_kit.lora_base import keep_from_repacking
from lora_kit.lora_files import AdapterFiles
from lora_kit.lora_targets import linear_layers

SHARED_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
# Above so many tokens a batch multiplies each adapter's rows apart; measured on two CPU cores and
# on a GPU by `benchmarks/adapters.py --part crossover`.
MASKED_TOKENS = 128
PACKED_KEPT = 4  # sets of adapters whose factors stay stacked


@dataclass(frozen=True)
class Factors:
    """An adapter's numbers where they are used: {layer path: (A (r, in), (s·B)ᵀ (r, out))}."""

    by_path: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(repr=False)
    bytes: int


@dataclass
class _Site:
    """Layers that read one input. `modules`: {path: layer}."""

    modules: dict[str, torch.nn.Module]


@dataclass
class _PackedSite:
    """The factors of a set of adapters, stacked for one site.

    a: (columns, in), path by path, within a path adapter by adapter. b: {path: (columns of the
    path, out)}; spans: {path: its columns}; parts: {path: {adapter: its columns of the path}};
    owners: (columns,) which adapter each column is of; pattern: a number for equal `owners`.
    """

    a: torch.Tensor
    b: dict[str, torch.Tensor]
    spans: dict[str, slice]
    parts: dict[str, dict[int, slice]]
    owners: torch.Tensor
    pattern: int


@dataclass
class _Rows:
    """Whose rows these are: a batch while it goes through the model.

    names: the adapters in play; which: (rows,) the place of each row's in `names`, −1 for none.
    """

    names: tuple[str, ...]
    which: torch.Tensor
    by_adapter: list[tuple[int, torch.Tensor]]
    packed: dict[int, _PackedSite]
    alone: bool
    masks: dict[tuple, torch.Tensor] = field(default_factory=dict)
    seen: tuple | None = None  # the input a site saw last, and its first product


class MixedLora:
    """Adapters beside a base, one of them (or none) for each row of a batch.

        mixed = MixedLora(model)
        mixed.put("sorting", mixed.factors(read_adapter(folder)))
        with mixed.rows(["sorting", None, "sorting"]):
            model(input_ids)                # three rows

    A call of the model from another thread, or outside `rows`, meets the bare base.
    """

    def __init__(self, model):
        from lora_kit.lora_state import lora_layers

        if hasattr(model, "peft_config") or lora_layers(model):
            raise BadInputError("The model carries adapters already: take them off first.")
        self.model = model
        self.layers = linear_layers(model)
        for layer in self.layers.values():
            # The kernel bitsandbytes would choose on a CPU computes in bf16 and spoils the bytes.
            # All at once: an adapter that comes later must not change what the base says.
            keep_from_repacking(layer)
        self.fingerprint = fingerprint_model(model)
        place = model.get_input_embeddings().weight
        self.device, self.dtype = place.device, place.dtype
        self._adapters: dict[str, Factors] = {}
        self._packed: dict[tuple[str, ...], dict[int, _PackedSite]] = {}
        self._patterns: dict[tuple[int, ...], int] = {}
        self._sites: list[_Site] = []
        self._site_of: dict[str, int] = {}
        self._hooks: list = []
        self._now = threading.local()
        self._lock = threading.Lock()

    # ------------------------------------------------------------------ adapters
    def factors(self, files: AdapterFiles) -> Factors:
        """An adapter's numbers on the model's device, in its dtype; checked against the base.

        Raises:
            BadInputError: another base (by fingerprint, names or shapes), or a DoRA adapter, whose
                magnitudes need the whole weight of each layer.
        """
        if files.config.get("use_dora"):
            raise BadInputError(
                f"{files.folder} is a DoRA adapter: it changes the base's part of the product too, "
                "so its rows cannot share a batch; merge it into a model of its own."
            )
        sentence = files.fingerprint.mismatch(self.fingerprint) if files.fingerprint else None
        if sentence:
            raise BadInputError(f"This adapter was trained on another base: {sentence}")
        config = files.config
        rank = int(config["r"])
        scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
        found, size = {}, 0
        for path, parts in files.tensors.items():
            a, b = parts["lora_A"], parts["lora_B"]
            layer = self.layers.get(path)
            if layer is None or (a.shape, b.shape) != (
                (rank, layer.in_features),
                (layer.out_features, rank),
            ):
                raise BadInputError(
                    f"The adapter in {files.folder} does not fit {path} of this model: it belongs "
                    "to another base."
                )
            a = a.to(self.device, self.dtype)
            b = (b.to(torch.float32) * scale).to(self.device, self.dtype)
            if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                raise BadInputError(f"The adapter in {files.folder} overflows {self.dtype}.")
            found[path] = (a.contiguous(), b.t().contiguous())
            size += a.nbytes + b.nbytes
        return Factors(found, size)

    def put(self, name: str, factors: Factors) -> None:
        """Make an adapter usable under a name.

        Raises:
            BadInputError: the name is taken.
        """
        with self._lock:
            if name in self._adapters:
                raise BadInputError(f"An adapter named {name!r} is there already.")
            for path in factors.by_path:
                if path not in self._site_of:
                    self._add_site(path)
            self._adapters[name] = factors

    def drop(self, name: str) -> None:
        """Take an adapter off. No batch may be using it.

        Raises:
            UnknownNameError: it is not there.
        """
        with self._lock:
            if name not in self._adapters:
                raise unknown_name("adapter", name, self._adapters)
            del self._adapters[name]
            self._packed = {k: v for k, v in self._packed.items() if name not in k}

    @property
    def names(self) -> list[str]:
        return list(self._adapters)

    def close(self) -> None:
        """Take all hooks and adapters off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._sites, self._site_of = [], [], {}
        self._adapters, self._packed = {}, {}

    def _add_site(self, path: str) -> None:
        parent, _, leaf = path.rpartition(".")
        shared = next((s for s in SHARED_INPUT if leaf in s), {leaf})
        paths = [p for p in (f"{parent}.{name}" if parent else name for name in sorted(shared))
                 if p in self.layers]  # fmt: skip
        number = len(self._sites)
        self._sites.append(_Site({p: self.layers[p] for p in paths}))
        for p in paths:
            self._site_of[p] = number
            self._hooks.append(self.layers[p].register_forward_hook(self._hook(number, p)))

    # ------------------------------------------------------------------ a batch
    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within the block, row i of every batch this thread runs uses adapter names[i].

        Raises:
            UnknownNameError: an adapter that is not here.
        """
        before = getattr(self._now, "rows", None)
        self._now.rows = self._plan(names)
        try:
            yield
        finally:
            self._now.rows = before

    def _plan(self, names: Sequence[str | None]) -> _Rows | None:
        used = sorted({n for n in names if n is not None})
        for name in used:
            if name not in self._adapters:
                raise unknown_name("adapter", name, self._adapters)
        if not used:
            return None
        with self._lock:
            kept, packed = self._pack(tuple(used))
        places = {name: i for i, name in enumerate(kept)}
        which = torch.tensor([places.get(n, -1) for n in names])
        apart = [(i, (which == i).nonzero()[:, 0].to(self.device)) for i in which.unique().tolist()]
        alone = len(kept) == 1 and len(apart) == 1
        return _Rows(kept, which.to(self.device), [g for g in apart if g[0] >= 0], packed, alone)

    def _pack(self, names: tuple[str, ...]) -> tuple[tuple[str, ...], dict[int, _PackedSite]]:
        """The stacked factors of these adapters; of a somewhat larger set where that is there
        already, because a batch that a row leaves is seldom worth stacking anew."""
        wanted = set(names)
        for kept, packed in self._packed.items():
            if wanted <= set(kept) and len(kept) <= max(1, 2 * len(names) - 1):
                return kept, packed
        stacked = ((i, self._stack(site, names)) for i, site in enumerate(self._sites))
        packed = {i: made for i, made in stacked if made is not None}
        while len(self._packed) >= PACKED_KEPT:
            del self._packed[next(iter(self._packed))]
        self._packed[names] = packed
        return names, packed

    def _stack(self, site: _Site, names: tuple[str, ...]) -> _PackedSite | None:
        a, b, owners = [], {}, []
        spans, parts = {}, {}
        for path in site.modules:
            found = {i: self._adapters[n].by_path.get(path) for i, n in enumerate(names)}
            mine = {i: factors for i, factors in found.items() if factors is not None}
            if not mine:
                continue
            start, parts[path] = len(owners), {}
            for i, (factor, _) in mine.items():
                parts[path][i] = slice(len(owners) - start, len(owners) - start + len(factor))
                owners += [i] * len(factor)
            spans[path] = slice(start, len(owners))
            a += [factor for factor, _ in mine.values()]
            b[path] = _joined([factor for _, factor in mine.values()])
        if not a:
            return None
        pattern = self._patterns.setdefault(tuple(owners), len(self._patterns))
        held = torch.tensor(owners, device=self.device)
        return _PackedSite(_joined(a), b, spans, parts, held, pattern)

    # ------------------------------------------------------------------ the products
    def _hook(self, number: int, path: str):
        def add(_module, inputs, out):
            rows = getattr(self._now, "rows", None)
            if rows is None:
                return None
            packed = rows.packed.get(number)
            if packed is None or path not in packed.spans:
                return None
            return detour(rows, packed, number, path, inputs[0], out)

        return add


def detour(rows: _Rows, packed: _PackedSite, number: int, path: str, x, out) -> torch.Tensor:
    """out + the rows' own detours; x (rows, ..., in), out (rows, ..., out_features)."""
    tokens = x.numel() // x.shape[-1]
    if rows.alone or tokens <= MASKED_TOKENS:
        return masked(rows, packed, number, path, x, out)
    return grouped(rows, packed, path, x, out)


def masked(rows: _Rows, packed: _PackedSite, number: int, path: str, x, out) -> torch.Tensor:
    """Every row through every adapter, and all columns but its own set to zero.

    They are set, not multiplied by zero: another adapter's overflow is not this row's.
    """
    if rows.seen is not None and rows.seen[0] == number and rows.seen[1] is x:
        hidden = rows.seen[2]
    else:
        flat = x.reshape(-1, x.shape[-1])
        hidden = flat.to(packed.a.dtype).mm(packed.a.t())
        if not rows.alone:
            hidden.masked_fill_(_mask(rows, packed, len(flat)), 0)
        rows.seen = (number, x, hidden) if len(packed.spans) > 1 else None
    return _add(out, hidden[:, packed.spans[path]], packed.b[path])


def _mask(rows: _Rows, packed: _PackedSite, tokens: int) -> torch.Tensor:
    """(tokens, columns): True where a column is not of the token's adapter. The layers of a model
    are alike, so a batch needs few of them."""
    key = (packed.pattern, tokens)
    if key not in rows.masks:
        each = rows.which.repeat_interleave(tokens // len(rows.which))
        rows.masks[key] = each[:, None] != packed.owners[None, :]
    return rows.masks[key]


def grouped(rows: _Rows, packed: _PackedSite, path: str, x, out) -> torch.Tensor:
    """Each adapter's rows multiplied with its own factors only."""
    start, parts = packed.spans[path].start, packed.parts[path]
    for adapter, places in rows.by_adapter:
        mine = parts.get(adapter)
        if mine is None:
            continue
        a = packed.a[start + mine.start : start + mine.stop]
        some = x.index_select(0, places).reshape(-1, x.shape[-1])
        low = some.to(a.dtype).mm(a.t()).mm(packed.b[path][mine])
        shape = (len(places), *out.shape[1:])
        out = out.index_add(0, places, low.view(shape).to(out.dtype))
    return out


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """One below the other; a single one is taken as it is, so that a batch of one adapter costs no
    copy."""
    return torch.cat(tensors) if tensors[1:] else tensors[0]


def _add(out: torch.Tensor, hidden: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if out.dtype != b.dtype or out.requires_grad or not out.is_contiguous():
        return out + hidden.mm(b).view(out.shape).to(out.dtype)
    out.view(-1, out.shape[-1]).addmm_(hidden, b)
    return out
