"""The worker of `distlora merge`: the folder, then what the receipt says of it; and of `distlora unmerge`."""

from __future__ import annotations

import json
from pathlib import Path

from distlora.output.tables import Table
from distlora.post.merge.kept import DTYPES
from distlora.post.merge.merge import merge_to
from distlora.post.merge.receipt import Receipt
from distlora.post.merge.request import Request, UnmergeRequest
from distlora.post.merge.unmerge import unmerge
from distlora.system.exit_codes import DONE, run_to_exit_code
from distlora.system.progress_lines import Progress, quieten


def run(request: Request) -> Receipt:
    """Everything that the request asks for; the result on stdout, progress on stderr."""
    out = Path(request.out)
    receipt = merge_to(
        request.name.read(),
        out,
        onto=request.onto,
        dtype=DTYPES[request.dtype],
        say=Progress(),
        residual=request.residual,
    )
    print(summary(receipt, out))
    return receipt


def summary(receipt: Receipt, out: Path) -> str:
    """What a terminal shows."""
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    lines = [f"wrote {out}: {size / 1e6:,.1f} MB in {receipt.dtype}, merge.json says what from, with hashes"]
    if receipt.weights:
        kept = receipt.total["kept"]
        rows = [["stored in", "of the adapter's change kept"]]
        rows += [[name if name != receipt.dtype else f"{name} (this)", f"{kept[name]:.2%}"] for name in kept]
        heading = f"{len(receipt.weights)} tensors changed, ||dW||/||W|| = {receipt.total['ratio']:.3g}"
        lines.append(Table(heading, rows).text())
    if receipt.residual:
        kept, of = receipt.residual["bytes"], receipt.residual["base_bytes"]
        lines.append(f"{kept / 1e6:,.1f} MB of it give the base back ({kept / of:.0%} of its {of / 1e6:,.1f} MB)")
    return "\n".join(lines)


def run_back(request: UnmergeRequest) -> None:
    """The way back."""
    files = unmerge(Path(request.merged), Path(request.out), say=Progress())
    print(f"wrote {request.out}: the base, {len(files)} files, each as it was by its SHA-256")


def main(argument: str) -> int:
    """Merge; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    quieten()

    def work() -> int:
        values = json.loads(argument)
        if "merged" in values:
            run_back(UnmergeRequest(**values))
        else:
            run(Request.read(argument))
        return DONE

    return run_to_exit_code(work)
