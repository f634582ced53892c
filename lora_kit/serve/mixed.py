"""Mixed batches: every row of a batch with an adapter of its own, or with none.

The base's product is one for all rows. Its detours are not: row i wants s·B A x with the A and B of
its own adapter. They lie in slots (`slots`), and are multiplied for all rows together (`products`).
To switch a row is to name another slot: no weight moves.

The products hang on the base's layers, as forward hooks or as forward passes of theirs. The model,
dense or in 4 bits, keeps its weights, and outside `rows(...)` it answers as the bare base, to the
bit. Within, the base's own products are made as the device likes them: on a GPU those of one input
together (`together`), on a CPU by oneDNN over packed weights (`lora_kit.packed_linear`). (Chen et
al. 2023, "Punica", section 4, whose CUDA kernel gathers likewise.)
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from lora_kit.errors import BadInputError, unknown_name
from lora_kit.fingerprint import fingerprint_model
from lora_kit.lora_base import keep_from_repacking
from lora_kit.lora_files import AdapterFiles, check_fit
from lora_kit.lora_targets import linear_layers
from lora_kit.packed_linear import TOKENS_FROM, packed_linears
from lora_kit.serve.products import At, Batch, add_detour, add_detours, begin_detour, plan_batch
from lora_kit.serve.slots import Factors, Slots, site_of
from lora_kit.serve.together import Left, Together, lay_together

__all__ = ["Factors", "MixedLora"]

# Fewer pages are fewer products. On a GPU all slots of a page take part in one; on a CPU those in
# play and the few between are read, and those that nobody has filled take no memory.
PAGE_SLOTS = 32
PLANS_KEPT = 8


class MixedLora:
    """Adapters beside a base, one of them (or none) for each row of a batch.

        mixed = MixedLora(model)
        mixed.put("sorting", mixed.factors(read_adapter(folder)))
        with mixed.rows(["sorting", None, "sorting"]):
            model(input_ids)                # three rows

    A call of the model from another thread, or outside `rows`, meets the bare base. For inference:
    no gradient goes through a detour. A weight or bias put in the place of another is noticed, but
    by passes that are recorded already (`graphs`). An fp32 base on a CPU takes its weights' memory
    twice, where there is enough.

    Args:
        model: the bare base, on its device.
        masked: how products are made, see `products`; by default as its device likes it.
        joined: whether layers that read one input are multiplied together, see `together`; only
            where products are masked, and by default on a GPU.

    Raises:
        BadInputError: a model that carries adapters already.
    """

    def __init__(self, model, masked: bool | None = None, joined: bool | None = None):
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
        self.masked = self.device.type != "cpu" if masked is None else masked
        joined = self.device.type == "cuda" if joined is None else joined
        self.slots = Slots(PAGE_SLOTS, zeroed=self.masked)
        self._plans: dict[tuple[str | None, ...], Batch] = {}
        self._now = threading.local()
        self._lock = threading.Lock()
        self.version = 0  # another number once the layers' weights may lie elsewhere
        self._left = Left()
        with contextlib.ExitStack() as undo:  # what is set up halfway is taken down again
            self._set_up(undo, joined and self.masked)
            self._undo = undo.pop_all()

    def _set_up(self, undo: contextlib.ExitStack, joined: bool) -> None:
        apart = dict(self.layers)
        if joined:
            for together in lay_together(self.layers, self._joined):
                undo.callback(together.part)
                apart = {
                    path: layer for path, layer in apart.items() if path not in together.layers
                }
        packed = packed_linears(self.model, tokens=TOKENS_FROM, when=lambda: self._inferring)
        undo.enter_context(packed)
        # On every layer from the start: a hook that came while another thread runs the model would
        # break into its walk through the hooks.
        for path, layer in apart.items():
            undo.callback(layer.register_forward_hook(self._hook(path)).remove)
            if self.device.type == "cuda":
                undo.callback(layer.register_forward_pre_hook(self._hook_before(path)).remove)

    # ------------------------------------------------------------------ adapters
    def factors(self, files: AdapterFiles) -> Factors:
        """An adapter's numbers on the model's device, in its dtype; checked against the base.

        Raises:
            BadInputError: another base (by fingerprint, names or shapes); an adapter that changes
                the base's part of the product too (DoRA, or PiSSA as peft leaves it).
        """
        sentence = files.fingerprint.mismatch(self.fingerprint) if files.fingerprint else None
        if sentence:
            raise BadInputError(f"This adapter was trained on another base: {sentence}")
        spec = check_fit(files, self.layers)
        if spec.dora or spec.init == "pissa":
            kind = "DoRA" if spec.dora else "PiSSA"
            raise BadInputError(
                f"{files.folder} is a {kind} adapter that changes the base's part of the product "
                "too, so its rows cannot share a batch: merge it into a model of its own."
            )
        a, b = {}, {}
        for path, parts in files.tensors.items():
            scaled = parts["lora_B"].to(torch.float32).t() * spec.scale
            a[path] = parts["lora_A"].to(self.device, self.dtype).contiguous()
            b[path] = scaled.to(self.device, self.dtype).contiguous()
            if not (torch.isfinite(a[path]).all() and torch.isfinite(b[path]).all()):
                raise BadInputError(f"The adapter in {files.folder} overflows {self.dtype}.")
        return Factors(spec.rank, a, b)

    def put(self, name: str, factors: Factors) -> None:
        """Make an adapter usable under a name.

        Raises:
            BadInputError: the name is taken.
        """
        with self._lock:
            self.slots.put(name, factors)

    def drop(self, name: str) -> None:
        """Take an adapter off. No batch may be using it.

        Raises:
            UnknownNameError: it is not there.
        """
        with self._lock:
            self._known(name)
            self.slots.drop(name)
            self._plans = {k: v for k, v in self._plans.items() if name not in k}

    @property
    def names(self) -> list[str]:
        return list(self.slots.at)

    def close(self) -> None:
        """Take all hooks and adapters off the model, and leave its products to torch again."""
        self._undo.close()
        self._plans = {}
        self.version += 1
        self.slots = Slots(self.slots.page_slots, self.slots.zeroed)

    def _known(self, name: str) -> None:
        if name not in self.slots.at:
            raise unknown_name("adapter", name, self.slots.at)

    # ------------------------------------------------------------------ a batch
    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within the block, row i of every batch this thread runs uses adapter names[i].

        Raises:
            UnknownNameError: an adapter that is not here.
        """
        with self.using(self._plan(tuple(names))):
            yield

    @contextmanager
    def using(self, batch: Batch | None) -> Iterator[None]:
        """As `rows`, for a batch that is planned already; None is the bare base."""
        before = self._batch, self._serving
        self._now.batch, self._now.serving = batch, True
        try:
            yield
        finally:
            self._now.batch, self._now.serving = before
            self._left.clear()

    @property
    def _batch(self) -> Batch | None:
        return getattr(self._now, "batch", None)

    @property
    def _serving(self) -> bool:
        return getattr(self._now, "serving", False)

    @property
    def _inferring(self) -> bool:
        return self._serving and not torch.is_grad_enabled()

    def places(self, names: Sequence[str | None]) -> list[At]:
        """Each row's page and slot, None for the bare base.

        Raises:
            UnknownNameError: an adapter that is not here.
        """
        with self._lock:
            for name in set(names) - {None}:
                self._known(name)
            return [None if n is None else self.slots.at[n] for n in names]

    def _plan(self, names: tuple[str | None, ...]) -> Batch | None:
        if names.count(None) == len(names):
            return None
        with self._lock:
            found = self._plans.get(names)
            if found is None:
                for name in set(names) - {None}:
                    self._known(name)
                at = [None if n is None else self.slots.at[n] for n in names]
                found = plan_batch(at, self.masked, self.device)
                while len(self._plans) >= PLANS_KEPT:
                    del self._plans[next(iter(self._plans))]
            self._plans.pop(names, None)
            self._plans[names] = found  # the one used last stands last
        return replace(found, seen=None)  # another thread may run a batch of the same rows

    def _joined(self, together: Together, path: str, x: torch.Tensor) -> torch.Tensor:
        """The forward pass of a layer that is multiplied together with others, detour and all."""
        batch, site = self._batch, together.site
        if not self._inferring or not together.current:
            layer = together.layers[path]
            out = torch.nn.functional.linear(x, layer.weight, layer.bias)
            detoured = None if batch is None else add_detour(batch, path, site, x, out)
            return out if detoured is None else detoured
        parts = self._left.of(together, x, batch)
        if path not in parts:  # each takes its part once: the same input later is multiplied again
            if batch is not None:
                begin_detour(batch, site, x)
            out = together.product(x)
            if batch is not None:
                add_detours(batch, together.columns, site, x, out)
            parts = self._left.keep(together, x, batch, out)
        return parts.pop(path)

    def _hook(self, path: str):
        site = site_of(path)

        def add(_module, inputs, out):
            batch = self._batch
            return None if batch is None else add_detour(batch, path, site, inputs[0], out)

        return add

    def _hook_before(self, path: str):
        site = site_of(path)

        def begin(_module, inputs) -> None:
            batch = self._batch
            if batch is not None and batch.kernels is not None:
                begin_detour(batch, site, inputs[0])

        return begin
