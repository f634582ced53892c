"""Values between the program under test and its checker: plain data, and nothing that acts.

What arrives is built here from JSON, so it is exactly a None, bool, int, float, complex, str,
bytes, list, tuple, dict, set, frozenset, Decimal or Fraction, whatever class the sender made. An
object whose `__eq__` says yes to everything arrives as the data it holds, or not at all.
"""

from __future__ import annotations

import json
import os
import struct
import sys

LARGEST = 8 * 2**20  # bytes of one message
_SEQUENCES = {"tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}
_NUMBERS = (("decimal", "Decimal"), ("fractions", "Fraction"))


class Garbled(Exception):
    """A message that is no message."""


def pack(value):
    """A value as JSON can hold it; instances of subclasses count as what they are made of.

    Anything else that can be iterated becomes an iterator, which equals nothing.

    Raises:
        TypeError: a value that a check could not compare.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, float):
        return float.__pos__(value)
    if isinstance(value, int):
        return {"int": format(int.__index__(value), "x")}  # no limit on digits, unlike decimal
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, list):
        return [pack(v) for v in list.__iter__(value)]
    if isinstance(value, dict):
        return {"dict": [[pack(k), pack(v)] for k, v in dict.items(value)]}
    for name, kind in (("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, kind):
            return {name: [pack(v) for v in kind.__iter__(value)]}
    for module, name in _NUMBERS:
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type) and isinstance(value, kind):
            return {name: str(value)}
    if hasattr(value, "__iter__"):
        return {"iterator": [pack(v) for v in value]}
    raise TypeError(f"a {type(value).__name__} cannot be handed to a check")


def unpack(packed):
    """The value that was packed, of exactly the types named above.

    Raises:
        Garbled: not something `pack` makes.
    """
    if packed is None or isinstance(packed, (bool, float, str)):
        return packed
    if isinstance(packed, list):
        return [unpack(v) for v in packed]
    try:
        ((name, content),) = packed.items()
        if name == "int":
            return int(content, 16)
        if name == "bytes":
            return bytes.fromhex(content)
        if name == "complex":
            return complex(float(content[0]), float(content[1]))
        if name == "dict":
            return {unpack(k): unpack(v) for k, v in content}
        if name == "Decimal":
            from decimal import Decimal

            return Decimal(content)
        if name == "Fraction":
            from fractions import Fraction

            return Fraction(*(int(part) for part in content.split("/")))
        return _SEQUENCES[name]([unpack(v) for v in content])
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise Garbled(f"not a packed value ({type(e).__name__})") from None


def send(handle: int, message) -> None:
    """Write one message: four bytes of length, then JSON."""
    data = json.dumps(message).encode()
    data = struct.pack("<I", len(data)) + data
    while data:
        data = data[os.write(handle, data) :]


def receive(handle: int, largest: int | None = LARGEST):
    """Read one message.

    Raises:
        EOFError: the sender is gone.
        Garbled: too long, or not JSON.
    """
    (size,) = struct.unpack("<I", _read(handle, 4))
    if largest is not None and size > largest:
        raise Garbled(f"{size:,} bytes in one answer, of at most {largest:,}")
    data = _read(handle, size)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as e:
        raise Garbled(f"not JSON ({type(e).__name__})") from None


def _read(handle: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        block = os.read(handle, min(size - len(data), 1 << 20))
        if not block:
            raise EOFError
        data += block
    return bytes(data)
