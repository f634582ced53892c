"""The fast way to decode 4-bit codes on a CPU: bitsandbytes' kernel, where it is right.

`quantize.dequantize` is the definition, in plain torch. A QLoRA training step decodes every weight
twice, and bitsandbytes' compiled kernel does that some five times as fast. It is used for what it
has been seen to get right in this process, bit for bit, and `dequantize` for all else; so the
numbers never depend on whether it is there.

Its known faults (0.50): where a row is no whole number of blocks, the AVX-512 version returns wrong
values, so it is never told the tensor's own rows, but one row a block; and it decodes fp4's −0.0 to
0.0, so it is asked for nf4 only.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from lora_kit.codebooks import codebook
from lora_kit.quantize import ABSMAX_BLOCK, QuantizedTensor, dequantize, quantize

KERNEL_BLOCKS = (32, 64, 128, 256, 512, 1024)  # from 2048 on bitsandbytes decodes in plain torch
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def decode(quantized: QuantizedTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`dequantize(quantized, dtype)`, the same bits, faster where bitsandbytes can do it.

    The first call imports bitsandbytes (a second or two) and tries its kernel on a small tensor.
    """
    q, dtype = quantized, quantized.dtype if dtype is None else dtype
    if (
        q.format == "nf4"
        and q.codes.device.type == "cpu"
        and q.numel % q.block_size == 0
        and not torch.compiler.is_compiling()  # a tracer cannot follow the trial
        and kernel_is_right(q.block_size, q.double_quant, dtype)
    ):
        return _by_kernel(q, dtype)
    return dequantize(q, dtype)


@lru_cache(maxsize=64)
def kernel_is_right(block_size: int, double_quant: bool, dtype: torch.dtype) -> bool:
    """Whether bitsandbytes is installed and decodes a trial tensor to `dequantize`'s bits."""
    if block_size not in KERNEL_BLOCKS or dtype not in KERNEL_DTYPES or _bitsandbytes() is None:
        return False
    # Blocks of very different sizes, more of them than share one scale of double quantisation, and
    # every one of the 256 bytes.
    blocks = ABSMAX_BLOCK + 44
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-4, 4, blocks)[torch.randperm(blocks, generator=generator)]
    trial = torch.randn(blocks, block_size, generator=generator) * sizes[:, None]
    q = quantize(trial, "nf4", block_size, double_quant)
    q.codes[:256] = torch.arange(256, dtype=torch.uint8)
    word = torch.int32 if dtype == torch.float32 else torch.int16
    return torch.equal(_by_kernel(q, dtype).view(word), dequantize(q, dtype).view(word))


def _by_kernel(q: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    functional = _bitsandbytes()
    of_absmax = None
    if q.double_quant:
        of_absmax = functional.QuantState(
            absmax=q.absmax_scales,
            code=codebook("dynamic8", q.codes.device),
            blocksize=ABSMAX_BLOCK,
            dtype=torch.float32,
        )
    state = functional.QuantState(
        absmax=q.stored_absmax,
        shape=(q.numel // q.block_size, q.block_size),
        blocksize=q.block_size,
        quant_type="nf4",
        dtype=dtype,
        offset=q.absmax_offset,
        state2=of_absmax,
    )
    with torch.no_grad():
        return functional.dequantize_4bit(q.codes, state).view(q.shape)


@lru_cache(maxsize=1)
def _bitsandbytes():
    try:
        import bitsandbytes.functional
    except (ImportError, OSError, RuntimeError):  # not installed, or no library for this machine
        return None
    return bitsandbytes.functional
