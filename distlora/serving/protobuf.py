"""Read and write the few protobuf messages of the Tinker SDK's wire (proto3), without a protobuf runtime.

The encoding is https://protobuf.dev/programming-guides/encoding: each field is a key (number << 3 | wire type) and a
value. Field numbers are those of the SDK 0.38; `wire.py` has them.
"""

from __future__ import annotations

import struct
from collections import defaultdict

from distlora.config import UserError

Value = int | memoryview
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5


def varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the number at a place of `data`, and the place behind it. Raises UserError if it is cut off."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number & (1 << 64) - 1, at
    raise UserError("the protobuf message is cut off or not one; send what tinker 0.38 sends")


def read_fields(data: memoryview) -> dict[int, list[Value]]:
    """Return the values of a message by field number: ints of varints, bytes of everything else."""
    values: defaultdict[int, list[Value]] = defaultdict(list)
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        kind = key & 7
        if kind == VARINT:
            value, at = varint(data, at)
            values[key >> 3].append(value)
            continue
        if kind == LENGTH:
            size, at = varint(data, at)
        else:
            size = {FIXED64: 8, FIXED32: 4}.get(kind, len(data) + 1)
        if size > len(data) - at:
            raise UserError("the protobuf message is cut off or not one; send what tinker 0.38 sends")
        values[key >> 3].append(data[at : at + size])
        at += size
    return values


def last_bytes(fields: dict[int, list[Value]], number: int) -> memoryview:
    """Return the bytes of a field, which are empty if the message has none. Raises UserError for a number."""
    value = fields.get(number, [memoryview(b"")])[-1]
    if isinstance(value, int):
        raise UserError(f"field {number} of a protobuf message is a number and should be bytes")
    return value


def all_bytes(fields: dict[int, list[Value]], number: int) -> list[memoryview]:
    """Return the bytes of each entry of a repeated field. Raises UserError for a number."""
    return [last_bytes({number: [value]}, number) for value in fields.get(number, [])]


def last_int(fields: dict[int, list[Value]], number: int) -> int:
    """Return an integer or enum field, signed, or 0. Raises UserError for bytes."""
    value = fields.get(number, [0])[-1]
    if not isinstance(value, int):
        raise UserError(f"field {number} of a protobuf message is bytes and should be a number")
    return value - (1 << 64) if value >> 63 else value


def last_text(fields: dict[int, list[Value]], number: int) -> str:
    """Return a string field, or "". Raises UserError for bytes that are not UTF-8."""
    try:
        return bytes(last_bytes(fields, number)).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"field {number} of a protobuf message is not UTF-8 text") from error


def last_double(fields: dict[int, list[Value]], number: int) -> float:
    """Return a double field, or 0. Raises UserError for another width."""
    value = last_bytes(fields, number)
    if len(value) not in (0, 8):
        raise UserError(f"field {number} of a protobuf message has {len(value)} bytes and should be a double")
    return float(struct.unpack("<d", value)[0]) if value else 0.0


def packed_ints(fields: dict[int, list[Value]], number: int) -> list[int]:
    """Return a repeated integer field, packed or not."""
    numbers = []
    for value in fields.get(number, []):
        at = 0
        while not isinstance(value, int) and at < len(value):
            one, at = varint(value, at)
            numbers.append(one)
        if isinstance(value, int):
            numbers.append(value)
    return numbers


def _write_varint(number: int) -> bytes:
    written = bytearray()
    while number > 127:
        written.append(number & 127 | 128)
        number >>= 7
    written.append(number)
    return bytes(written)


def field(number: int, value: int | float | str | bytes) -> bytes:
    """Return one field: an int as a varint, a float as a double, text and bytes with their length."""
    if isinstance(value, float):
        return _write_varint(number << 3 | FIXED64) + struct.pack("<d", value)
    if isinstance(value, int):
        return _write_varint(number << 3 | VARINT) + _write_varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _write_varint(number << 3 | LENGTH) + _write_varint(len(data)) + data
