"""A GGUF file written as its tensors come: the header first, by the package's writer, then rows after rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from distlora.post.export.gguf.tensors import Planned
from distlora.post.merge.folder import check_space
from distlora.system import atomic_io
from distlora.system.progress_lines import Progress


def write_file(path: Path, arch: str, describe: Callable[[GGUFWriter], None], tensors: Sequence[Planned]) -> None:
    """`describe` adds the metadata. In memory are a few rows; on stderr, how far it is. Raises UserError for a weight
    that its type cannot hold, and where the disk is too small.
    """
    total = sum(tensor.num_bytes for tensor in tensors)
    check_space(path, total)
    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
    writer = GGUFWriter(path, arch)
    describe(writer)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    stream = writer.fout[0]
    progress, done = Progress(), 0
    writer.write_padding(stream, stream.tell())
    for tensor in tensors:
        written = 0
        for part in tensor.encoded():
            stream.write(part.data)
            written += part.nbytes
            progress(f"{(done + written) / 1e6:,.0f} of {total / 1e6:,.0f} MB, {tensor.name}")
        assert written == tensor.num_bytes, f"{tensor.name}: {written} of {tensor.num_bytes} bytes"
        writer.write_padding(stream, written)
        done += written
    writer.close()
    atomic_io.sync(path)
