"""wandb's own log of an offline run, read back."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any


def read_wandb_log(folder: Path) -> list[Any]:
    """Return the records of an offline run.

    The file is a LevelDB log: 7-byte file header, 32 KiB blocks of crc, length, kind, payload.
    """
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("run-*.wandb")
    data, position, record, records = path.read_bytes(), 7, b"", []
    while len(data) - position > 7:
        position += (32768 - position % 32768) * (32768 - position % 32768 < 7)  # A header never straddles two blocks.
        crc, length, kind = struct.unpack_from("<IHB", data, position)
        chunk = data[position + 7 : position + 7 + length]
        assert zlib.crc32(bytes([kind]) + chunk) == crc
        position += 7 + length
        record += chunk
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(record))
            record = b""
    return records
