"""The worker of `distlora merge`: the folder, then what the receipt says of it."""

from __future__ import annotations

from pathlib import Path

from distlora.output.tables import Table
from distlora.post.merge.kept import DTYPES
from distlora.post.merge.merge import merge_to
from distlora.post.merge.receipt import Receipt
from distlora.post.merge.request import Request
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
    return "\n".join(lines)


def main(argument: str) -> int:
    """Merge; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    quieten()

    def work() -> int:
        run(Request.read(argument))
        return DONE

    return run_to_exit_code(work)
