"""The keys and values of rows that come and go: one row of a buffer each, written in place.

A decoding step writes one token's keys and values into each row, wherever that row has got to, and
reads a view. Nothing is copied but when a buffer has to grow, and then it doubles; the place of a
row that ends is taken by the last one. transformers' layers ask a cache for one thing, `update`,
and get it here.
"""

from __future__ import annotations

import torch

FIRST_ROWS, FIRST_TOKENS = 4, 64


class RowCache:
    """Keys and values of `rows` sequences, for every layer (rows, heads, tokens, head_dim).

    lengths: how many tokens of each row are there. version: another number whenever a buffer has
    come or gone. idle_bytes: so large may buffers be that stay when the last row goes; by default
    none does. A forward pass is opened with `prefill`, `decode` or `decode_at`, which say which
    rows it writes and where; the caller advances `lengths` when it ended well, so that a pass that
    failed can be made again.
    """

    def __init__(self, layers: int):
        self.idle_bytes, self.version = 0, 0
        self.keys: list[torch.Tensor | None] = [None] * layers
        self.values: list[torch.Tensor | None] = [None] * layers
        self.lengths: list[int] = []
        self._rows: slice | torch.Tensor = slice(0, 0)
        self._where: tuple[torch.Tensor, torch.Tensor] | None = None
        self._reach = 0

    def __len__(self) -> int:
        return len(self.lengths)

    # ------------------------------------------------------------------ rows
    def add(self, count: int) -> slice:
        """`count` new, empty rows behind the others."""
        start = len(self.lengths)
        self.lengths += [0] * count
        return slice(start, start + count)

    @torch.inference_mode()  # the buffers were made in it
    def drop(self, row: int, spoiled: bool = False) -> None:
        """Take a row out; the last one takes its place.

        spoiled: it may hold NaN, which would reach the next row there through 0 · NaN.
        """
        last = len(self.lengths) - 1
        length = self.lengths[last]
        try:
            for tensor in (*self.keys, *self.values):
                if tensor is not None and last < len(tensor):
                    if spoiled:
                        tensor[row] = 0
                    if row != last:
                        tensor[row, :, :length] = tensor[last, :, :length]
        finally:  # whatever a device says, the row is gone
            self.lengths[row] = length
            self.lengths.pop()
            # An idle server holds no memory, but what recorded passes write to.
            if not self.lengths and self.bytes > self.idle_bytes:
                self.keys, self.values = [None] * len(self.keys), [None] * len(self.values)
                self.version += 1

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values) if t is not None)

    @property
    def complete(self) -> bool:
        """Whether every layer has its buffers."""
        return all(tensor is not None for tensor in (*self.keys, *self.values))

    # ------------------------------------------------------------------ a forward pass
    def prefill(self, rows: slice | torch.Tensor, tokens: int) -> None:
        """The next pass writes the first `tokens` tokens of these rows, and sees only them. Rows in
        a tensor may be others each time the pass is replayed; their buffers must be there."""
        self._rows, self._where, self._reach = rows, None, tokens

    def decode(self, rows: slice | list[int], device) -> tuple[torch.Tensor, torch.Tensor]:
        """The next pass writes one token of each of these rows.

        Returns:
            positions (rows, 1) of the tokens, and mask (rows, 1, 1, reach), True where a row's
            tokens are, the new one included.
        """
        numbers = list(range(rows.start, rows.stop)) if isinstance(rows, slice) else rows
        at = torch.tensor([self.lengths[i] for i in numbers], device=device)
        reach = max(self.lengths[i] for i in numbers) + 1
        self._rows = rows if isinstance(rows, slice) else torch.tensor(rows, device=device)
        self._where = (torch.tensor(numbers, device=device), at)
        self._reach = reach
        mask = torch.arange(reach, device=device)[None] <= at[:, None]
        return at[:, None], mask[:, None, None]

    def decode_at(self, at: torch.Tensor, reach: int) -> torch.Tensor:
        """The next pass writes a token of each of the first rows at places `at` (rows,), a tensor
        whose numbers may be others each time the pass is replayed, and sees `reach` tokens. The
        buffers must be that large (`reserve`).

        Returns:
            mask (rows, 1, 1, reach), as `decode`.
        """
        self._rows, self._reach = slice(0, len(at)), reach
        self._where = (torch.arange(len(at), device=at.device), at)
        mask = torch.arange(reach, device=at.device)[None] <= at[:, None]
        return mask[:, None, None]

    @torch.inference_mode()
    def reserve(self, rows: int, tokens: int) -> None:
        """Make the buffers that are there at least so large, one after another: old and new ones of
        all layers together would take half as much again. Where memory ends in between, some have
        grown, and the next call goes on."""
        for tensors in (self.keys, self.values):
            for layer, held in enumerate(tensors):
                if held is not None:
                    tensors[layer] = self._room(held, held, rows, tokens)

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_, **__):
        """Write a layer's new keys and values (rows, heads, tokens, head_dim); return all that the
        pass looks at."""
        found = []
        for tensors, new in ((self.keys, key), (self.values, value)):
            rows = max(len(self.lengths), len(new))
            held = tensors[layer] = self._room(tensors[layer], new, rows, self._reach)
            if self._where is None:  # a prompt's tokens see each other and nothing else
                held[self._rows, :, : self._reach] = new
                found.append(new)
            else:
                held[self._where[0], :, self._where[1]] = new[:, :, 0]
                found.append(held[self._rows, :, : self._reach])
        return found[0], found[1]

    def _room(self, held: torch.Tensor | None, like: torch.Tensor, rows: int, tokens: int):
        """A buffer large enough: the one there is, or one of twice the size with its content."""
        if held is not None and held.shape[0] >= rows and held.shape[2] >= tokens:
            return held
        before = (0, 0) if held is None else (held.shape[0], held.shape[2])
        shape = [
            doubled(before[0] or FIRST_ROWS, rows),
            like.shape[1],
            doubled(before[1] or FIRST_TOKENS, tokens),
            like.shape[3],
        ]
        # Zeros, not whatever lay there: a masked place still takes part in 0 · value.
        grown = like.new_zeros(shape)
        self.version += 1
        if held is not None:
            grown[: before[0], :, : before[1]] = held
        return grown

    # What transformers' masks would ask; ours are made already.
    def get_seq_length(self, *_) -> int:
        return 0


def doubled(size: int, wanted: int) -> int:
    """`size`, doubled until it is at least `wanted`."""
    while size < wanted:
        size *= 2
    return size
