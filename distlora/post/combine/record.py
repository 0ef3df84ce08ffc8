"""combine.json: of what an adapter was made, and what a rank dropped of it; and the same for a terminal."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distlora.output.tables import Table
from distlora.post.combine.request import Request
from distlora.post.combine.result import Combination
from distlora.run_folder.checkpoints import sha256
from distlora.weights.peft_folder import WEIGHTS_NAME


def record(request: Request, made: Combination, folder: Path) -> dict[str, Any]:
    """combine.json."""
    energy, dropped = (sum(values) for values in zip(*made.energy.values(), strict=True)) if made.energy else (0.0, 0.0)
    worst = max(made.energy, key=lambda path: _share(*made.energy[path]), default=None)
    return {
        "command": request.command,
        "date": f"{datetime.date.today():%Y-%m-%d}",
        "version": importlib.metadata.version("distlora"),
        "method": request.method,
        "rank": request.rank,
        "density": request.density,
        "majority_sign_method": request.majority_sign_method if request.how.elects else None,
        "seed": request.seed if request.how.draws else None,
        "base_fingerprint": next((member.base for member in request.members if member.base), None),
        "members": [
            {
                "place": member.place,
                "weight": member.weight,
                "quant": member.quant,
                "sha256": sha256(Path(member.folder) / WEIGHTS_NAME),
            }
            for member in request.members
        ],
        "sha256": sha256(folder / WEIGHTS_NAME),
        "weights": len(made.paths),
        "ranks": {"smallest": min(made.ranks.values()), "largest": max(made.ranks.values())},
        "truncation": None
        if worst is None
        else {
            # Frobenius norms over all weights, and of the weight that lost the largest share.
            "norm": math.sqrt(energy),
            "dropped": math.sqrt(dropped),
            "share": _share(energy, dropped),
            "worst": {"path": worst, "share": _share(*made.energy[worst])},
        },
    }


def _share(energy: float, dropped: float) -> float:
    """||what was dropped|| / ||dW||."""
    return math.sqrt(dropped / energy) if energy > 0 else 0.0


def told(request: Request, found: Mapping[str, Any]) -> str:
    """The result, for the terminal."""
    rows = [("adapter", "weight", "base held in")]
    rows += [(m.place, f"{m.weight:g}", m.quant or "unknown") for m in request.members]
    ranks = found["ranks"]
    same = ranks["smallest"] == ranks["largest"]
    rank = f"rank {ranks['largest']}" if same else f"ranks {ranks['smallest']} to {ranks['largest']}"
    lines = [Table(f"{request.method}: {request.how.what}", rows).text(), f"\n{found['weights']} weights, {rank}"]
    if (lost := found["truncation"]) is not None:
        lines.append(
            f"the rank dropped {lost['share']:.2%} of ||dW|| = {lost['norm']:.4g} over all weights, at most "
            f"{lost['worst']['share']:.2%} of one ({lost['worst']['path']})"
        )
    return "\n".join(lines)
