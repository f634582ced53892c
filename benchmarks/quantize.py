"""Quantise and dequantise against bitsandbytes on this machine: one table, one ratio a row.

    python benchmarks/quantize.py [--size 4096] [--threads 2] [--repeats 7]

Before anything is timed, codes, absmax and values are checked to be the same bits.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import time

import torch

from lora_kit.codebooks import codebook
from lora_kit.quantize import dequantize, quantize

logging.disable(logging.WARNING)
import bitsandbytes  # noqa: E402
import bitsandbytes.functional as bnb  # noqa: E402


def milliseconds(first, second, repeats: int) -> tuple[float, float]:
    """Medians of two functions run in turn, so that both meet the same machine."""
    times: tuple[list[float], list[float]] = ([], [])
    for work in (first, second):
        work()
    for _ in range(repeats):
        for work, seen in zip((first, second), times, strict=True):
            started = time.perf_counter()
            work()
            seen.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[0]), statistics.median(times[1])


def rows(size: int, dtype: torch.dtype):
    """(what, theirs, ours), each pair checked for equal bits first."""
    x = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    for format, double in (("nf4", False), ("nf4", True), ("fp4", False)):
        settings = {"blocksize": 64, "quant_type": format, "compress_statistics": double}
        codes, state = bnb.quantize_4bit(x, **settings)
        q = quantize(x, format, 64, double)
        assert torch.equal(codes.flatten(), q.codes)
        assert torch.equal(bnb.dequantize_4bit(codes, state), dequantize(q))
        name = f"{format}{' + double' if double else ''}"
        yield (
            f"{name} quantise",
            lambda s=settings: bnb.quantize_4bit(x, **s),
            lambda f=format, d=double: quantize(x, f, 64, d),
        )
        yield (
            f"{name} dequantise",
            lambda c=codes, s=state: bnb.dequantize_4bit(c, s),
            lambda q=q: dequantize(q),
        )
    for format in ("int8", "dynamic8"):
        table = codebook(format).clone()
        codes, state = bnb.quantize_blockwise(x, code=table, blocksize=64)
        q = quantize(x, format, 64)
        assert torch.equal(codes, q.unpacked_codes())
        assert torch.equal(bnb.dequantize_blockwise(codes, state), dequantize(q))
        yield (
            f"{format} quantise",
            lambda t=table: bnb.quantize_blockwise(x, code=t, blocksize=64),
            lambda f=format: quantize(x, f, 64),
        )
        yield (
            f"{format} dequantise",
            lambda c=codes, s=state: bnb.dequantize_blockwise(c, s),
            lambda q=q: dequantize(q),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="of the square weight")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"{args.size} x {args.size} {args.dtype}, {args.threads} threads, "
        f"median of {args.repeats}; {platform.processor() or platform.machine()} "
        f"({torch.backends.cpu.get_cpu_capability()}), torch {torch.__version__}, "
        f"bitsandbytes {bitsandbytes.__version__}\n"
    )
    print("| block 64 | bitsandbytes, ms | lora_kit, ms | lora_kit is |")
    print("|---|---|---|---|")
    for name, theirs, ours in rows(args.size, getattr(torch, args.dtype)):
        a, b = milliseconds(theirs, ours, args.repeats)
        verdict = f"{a / b:.2f}x as fast" if a >= b else f"{b / a:.2f}x slower"
        print(f"| {name} | {a:.1f} | {b:.1f} | {verdict} |", flush=True)


if __name__ == "__main__":
    main()
