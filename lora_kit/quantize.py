"""Block-wise quantisation: `quantize` a tensor to 4 or 8 bits, `dequantize` it again.

For a block of `block_size` neighbouring values x (in row-major order) with absmax = max |x|:

    code_i = index of the level nearest to x_i / absmax        (one of 16 or 256 levels)
    x̂_i    = absmax · level[code_i]

Two 4-bit codes share a byte, the first in its upper half. Double quantisation stores the absmax
values themselves as 8-bit codes: their mean is taken off, and blocks of 256 of them are quantised
with the dynamic tree. With 64 weights to a block that is 8/64 + 32/(64·256) = 0.127 bits a
parameter in place of 32/64 = 0.5. (QLoRA, Dettmers et al. 2023, section 3.)

Codes, absmax and dequantised values equal those of bitsandbytes 0.50 on a CPU, bit for bit.

Memory: beside its result, `quantize` needs about 10 bytes for each value of one chunk (2^19 values,
so some 5 MB), and a float copy only of a tensor that is not contiguous. `dequantize` of a 4-bit
tensor likewise; neither grows with the tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from lora_kit.codebooks import BITS, FORMATS, codebook, decision_bounds
from lora_kit.errors import BadInputError, unknown_name

ABSMAX_BLOCK = 256  # absmax values to a block of double quantisation
GRID = 65535  # steps of [-1, 1] to which bitsandbytes' CPU kernel rounds before an 8-bit look-up
CHUNK = {"cpu": 1 << 19}  # values at a time: small enough for a core's cache, large enough to pay
CHUNK_ELSEWHERE = 1 << 24
SMALLEST_ABSMAX = 1e-38  # a block of zeros is divided by this in place of 0
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class QuantizationError:
    """How far a dequantised tensor lies from the original.

    mean_abs, rms, max_abs: of x - x̂, in the units of x. relative: ‖x - x̂‖ / ‖x‖. sqnr_db: signal to
    quantisation noise, 20·log10(‖x‖ / ‖x - x̂‖), in decibels.
    """

    mean_abs: float
    rms: float
    max_abs: float
    relative: float
    sqnr_db: float


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor held as codes and one scale for each block.

    codes: uint8. 4-bit: ceil(n/2) bytes, two codes each; 8-bit: n bytes. Always flat.
    stored_absmax: float32, one for each block; with double quantisation uint8 codes of the dynamic
    tree, and then `absmax_scales` (float32, one for each 256 of them) and `absmax_offset` (the mean
    taken off) are set as well.
    shape, dtype: of the tensor it was made from, and of what `dequantize` returns.
    """

    codes: torch.Tensor
    stored_absmax: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    format: str
    block_size: int
    absmax_scales: torch.Tensor | None = None
    absmax_offset: torch.Tensor | None = None

    def __post_init__(self):
        if self.format not in FORMATS:
            raise unknown_name("quantisation format", self.format, FORMATS)
        _check_block_size(self.block_size)
        n = self.numel
        want = -(-n // 2) if BITS[self.format] == 4 else n
        if self.codes.dtype != torch.uint8:
            raise BadInputError(
                f"{self.format} codes are bytes (torch.uint8), not {self.codes.dtype}."
            )
        if self.codes.numel() != want:
            raise BadInputError(
                f"A {self.format} tensor of shape {tuple(self.shape)} needs {want} bytes of codes, "
                f"but {self.codes.numel()} were given: the packed data and the shape do not match."
            )
        blocks = -(-n // self.block_size)
        if self.stored_absmax.numel() != blocks:
            raise BadInputError(
                f"{n} values in blocks of {self.block_size} need {blocks} absmax values, "
                f"but {self.stored_absmax.numel()} were given."
            )
        kind = torch.uint8 if self.double_quant else torch.float32
        if self.stored_absmax.dtype != kind:
            raise BadInputError(
                f"With double_quant={self.double_quant} the absmax values are {kind}, "
                f"not {self.stored_absmax.dtype}."
            )

    @property
    def double_quant(self) -> bool:
        return self.absmax_scales is not None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def absmax(self) -> torch.Tensor:
        """The float32 scale of each block, decoded where they are quantised themselves."""
        if not self.double_quant:
            return self.stored_absmax
        scales = _look_up_8bit(
            self.stored_absmax, self.absmax_scales, "dynamic8", ABSMAX_BLOCK, torch.float32
        )
        return scales.add_(self.absmax_offset)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, absmax values and their own scales (not of the codebook: one for all)."""
        parts = (self.codes, self.stored_absmax, self.absmax_scales, self.absmax_offset)
        return sum(p.numel() * p.element_size() for p in parts if p is not None)

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.nbytes / self.numel

    def unpacked_codes(self) -> torch.Tensor:
        """One code to a byte, in the tensor's own shape."""
        if BITS[self.format] == 8:
            return self.codes.view(self.shape)
        return unpack(self.codes, self.numel).view(self.shape)

    def error(self, original: torch.Tensor) -> QuantizationError:
        """Compare with the tensor this was made from, in float64."""
        if original.shape != self.shape:
            raise BadInputError(
                f"Cannot compare a quantised {tuple(self.shape)} with a {tuple(original.shape)}."
            )
        x = original.detach().double()
        gap = x - dequantize(self).double()
        noise, signal = gap.norm().item(), x.norm().item()
        return QuantizationError(
            mean_abs=gap.abs().mean().item(),
            rms=gap.square().mean().sqrt().item(),
            max_abs=gap.abs().max().item(),
            relative=noise / signal if signal else 0.0,
            sqnr_db=20 * math.log10(signal / noise) if noise and signal else math.inf,
        )


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two 4-bit codes to a byte, the first in the upper half; an odd one out is padded with 0."""
    flat = codes.reshape(-1)
    if flat.dtype != torch.uint8:
        raise BadInputError(f"Codes to pack are torch.uint8, not {flat.dtype}.")
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return (flat[0::2] << 4) | flat[1::2]


def unpack(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` 4-bit codes of `pack`'s bytes, one to a byte.

    Raises:
        BadInputError: the bytes cannot hold exactly `count` codes.
    """
    flat = packed.reshape(-1)
    if flat.numel() != -(-count // 2):
        raise BadInputError(f"{flat.numel()} packed bytes cannot hold exactly {count} codes.")
    return torch.stack([flat >> 4, flat & 15], dim=1).view(-1)[:count]


def quantize(
    weight: torch.Tensor,
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = False,
) -> QuantizedTensor:
    """Quantise a float tensor block by block.

    Args:
        weight: any shape, float32, float16 or bfloat16, finite. Taken in row-major order; the last
            block may be short.
        format: "nf4", "fp4", "int4" (16 levels), "int8" (k/127) or "dynamic8" (dynamic tree).
        block_size: values that share a scale; a power of two, at most the number of values.
        double_quant: quantise the absmax values too.

    Raises:
        UnknownNameError: no such format.
        BadInputError: empty, not floating, NaN or infinite, or an impossible block size.
    """
    if format not in FORMATS:
        raise unknown_name("quantisation format", format, FORMATS)
    _check_weight(weight, block_size)
    with torch.no_grad():
        flat = weight.detach().reshape(-1)
        run = _quantize_4bit if BITS[format] == 4 else _quantize_8bit
        codes, absmax = run(flat, format, block_size)
        scales = offset = None
        if double_quant:
            offset = absmax.mean()
            absmax, scales = _quantize_8bit(absmax - offset, "dynamic8", ABSMAX_BLOCK)
    return QuantizedTensor(
        codes, absmax, weight.shape, weight.dtype, format, block_size, scales, offset
    )


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The tensor that the codes stand for, in its own shape and dtype (or `dtype`).

    The product absmax · level is taken in float32 and rounded once.
    """
    q = quantized
    dtype = q.dtype if dtype is None else dtype
    with torch.no_grad():
        if BITS[q.format] == 4:
            flat = _look_up_4bit(q.codes, q.absmax, q.format, q.block_size, q.numel, dtype)
        else:
            flat = _look_up_8bit(q.codes, q.absmax, q.format, q.block_size, dtype)
    return flat.view(q.shape)


def nearest_codes(values: torch.Tensor, format: str) -> torch.Tensor:
    """The code of the level nearest to each value in [-1, 1], exactly; ties go to the lower level.

    One comparison with the midpoints, the definition itself: slow, and what the fast paths are
    tested against.
    """
    bounds, order = decision_bounds(format, values.device)
    return order[torch.bucketize(values.float().clamp(-1, 1), bounds)]


# --- how it is done ---------------------------------------------------------------------------


def _check_block_size(block_size: int) -> None:
    if not isinstance(block_size, int) or block_size < 2 or block_size & (block_size - 1):
        raise BadInputError(f"block_size must be a power of two, at least 2, not {block_size!r}.")


def _check_weight(weight: torch.Tensor, block_size: int) -> None:
    if not isinstance(weight, torch.Tensor):
        raise BadInputError(f"quantize takes a torch tensor, not {type(weight).__name__}.")
    if weight.dtype not in FLOATS:
        raise BadInputError(
            f"quantize takes float32, float16 or bfloat16, not {weight.dtype}: convert it first."
        )
    if weight.numel() == 0:
        raise BadInputError(f"An empty tensor (shape {tuple(weight.shape)}) cannot be quantised.")
    _check_block_size(block_size)
    if block_size > weight.numel():
        raise BadInputError(
            f"block_size {block_size} is larger than the tensor, which has {weight.numel()} values."
        )


def _check_finite(absmax: torch.Tensor, block_size: int, start: int) -> None:
    # A block's maximum is NaN or infinite exactly if one of its values is: no second pass needed.
    bad = ~torch.isfinite(absmax)
    if bad.any():
        first = start // block_size + int(bad.nonzero()[0])
        raise BadInputError(
            f"The weight has NaN or infinite values, the first in block {first} (values "
            f"{first * block_size} to {(first + 1) * block_size - 1}): mend them before quantising."
        )


def _chunk(device: torch.device, block_size: int) -> int:
    return max(CHUNK.get(device.type, CHUNK_ELSEWHERE), block_size)


def _quantize_4bit(flat: torch.Tensor, format: str, block_size: int):
    n, device = flat.numel(), flat.device
    bounds, order = decision_bounds(format, device)
    levels = [b.item() for b in bounds.cpu()]
    ascending = format != "fp4"
    codes = torch.empty(-(-n // 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=device)
    step = _chunk(device, block_size)
    whole = n - n % block_size
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        blocks = flat[start:stop].view(-1, block_size).float()
        scale = absmax[start // block_size : stop // block_size]
        torch.amax(blocks.abs(), dim=1, out=scale)
        _check_finite(scale, block_size, start)
        reciprocal = (1.0 / scale.clamp(min=SMALLEST_ABSMAX)).unsqueeze(1)
        rank = _count_below((blocks * reciprocal).view(-1), levels)
        _pack_into(codes[start // 2 : stop // 2], rank if ascending else order[rank.int()])
    if whole < n:
        # bitsandbytes divides the last, short block where it multiplies the whole ones.
        rest = flat[whole:].float()
        scale = rest.abs().max().clamp(min=SMALLEST_ABSMAX)
        absmax[-1] = scale
        _check_finite(absmax[-1:], block_size, whole)
        scaled = torch.cat([rest / scale, rest.new_zeros(n % 2)])
        rank = _count_below(scaled, levels)
        _pack_into(codes[whole // 2 :], rank if ascending else order[rank.int()])
    return codes, absmax


def _count_below(values: torch.Tensor, levels: list[float]) -> torch.Tensor:
    # rank = #{bounds < v}: fifteen vectorised comparisons are three times as fast as a binary
    # search for each value, because nothing branches and all stays in the cache.
    above = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    as_byte = above.view(torch.uint8)
    rank = torch.gt(values, levels[0]).view(torch.uint8)
    for level in levels[1:]:
        torch.gt(values, level, out=above)
        rank.add_(as_byte)
    return rank


def _pack_into(out: torch.Tensor, codes: torch.Tensor) -> None:
    pairs = codes.view(-1, 2)
    torch.add(pairs[:, 1], pairs[:, 0], alpha=16, out=out)


@lru_cache(maxsize=16)
def _pair_table(format: str, device: torch.device, dtype: torch.dtype = torch.float32):
    # Entry b: the two float32 levels that byte b stands for, seen as one 64-bit integer, so that
    # one look-up brings two values.
    table = codebook(format, device)
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)
    return pairs.contiguous().view(torch.int64).view(-1)


def _look_up_4bit(codes, absmax, format, block_size, n, dtype) -> torch.Tensor:
    device = codes.device
    table = _pair_table(format, device)
    out = torch.empty(n + n % 2, dtype=dtype, device=device)
    step = _chunk(device, block_size)
    buffer = None if dtype == torch.float32 else torch.empty(step, device=device)
    for start in range(0, n, step):
        stop = min(start + step, n + n % 2)
        values = out[start:stop] if buffer is None else buffer[: stop - start]
        torch.take(table, codes[start // 2 : stop // 2].long(), out=values.view(torch.int64))
        _scale_blocks(values, absmax[start // block_size :], block_size)
        if buffer is not None:
            out[start:stop] = values
    return out[:n]


def _scale_blocks(values: torch.Tensor, absmax: torch.Tensor, block_size: int) -> None:
    whole = values.numel() - values.numel() % block_size
    blocks = whole // block_size
    values[:whole].view(-1, block_size).mul_(absmax[:blocks].unsqueeze(1))
    if whole < values.numel() and blocks < absmax.numel():
        values[whole:].mul_(absmax[blocks])


@lru_cache(maxsize=16)
def _grid_table(format: str, device: torch.device) -> torch.Tensor:
    # The code of each of 65,536 evenly spaced values of [-1, 1].
    grid = -1.0 + (2.0 * torch.arange(GRID + 1, dtype=torch.float32)) / GRID
    return nearest_codes(grid, format).to(device)


def _quantize_8bit(flat: torch.Tensor, format: str, block_size: int):
    n, device = flat.numel(), flat.device
    table = _grid_table(format, device)
    codes = torch.empty(n, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=device)
    step = _chunk(device, block_size)
    for start in range(0, n, step):
        part = flat[start : start + step].float()
        if short := -part.numel() % block_size:
            part = torch.cat([part, part.new_zeros(short)])
        blocks = part.view(-1, block_size)
        scale = absmax[start // block_size : start // block_size + blocks.shape[0]]
        torch.amax(blocks.abs(), dim=1, out=scale)
        _check_finite(scale, block_size, start)
        reciprocal = (1.0 / scale.clamp(min=SMALLEST_ABSMAX)).unsqueeze(1)
        place = (blocks * reciprocal).clamp_(-1, 1).add_(1.0).mul_(0.5).mul_(GRID).add_(0.5)
        # A block of zeros has code 0 throughout (a level of -1 or so, times an absmax of 0).
        place.masked_fill_((scale == 0).unsqueeze(1), 0.0)
        index = place.view(-1)[: min(step, n - start)].long()
        torch.take(table, index, out=codes[start : start + step])
    return codes, absmax


def _look_up_8bit(codes, absmax, format, block_size, dtype) -> torch.Tensor:
    n, device = codes.numel(), codes.device
    table = codebook(format, device)
    out = torch.empty(n, dtype=dtype, device=device)
    step = _chunk(device, block_size)
    buffer = None if dtype == torch.float32 else torch.empty(step, device=device)
    for start in range(0, n, step):
        stop = min(start + step, n)
        values = out[start:stop] if buffer is None else buffer[: stop - start]
        torch.take(table, codes[start:stop].long(), out=values)
        _scale_blocks(values, absmax[start // block_size :], block_size)
        if buffer is not None:
            out[start:stop] = values
    return out
