"""Decide train.compile=auto once per run, alike on every rank, and record it, so that a resume has the same bits."""

from __future__ import annotations

from pathlib import Path

import torch

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.spec import architecture_of
from distlora.config import Config, UserError
from distlora.model import fused_modules
from distlora.parallel import Ranks, from_rank_0, max_over_ranks
from distlora.run_folder.layout import COMPILED_NAME, compiled_before
from distlora.system import atomic_io


def decided(
    config: Config, ranks: Ranks, *, base: CheckpointFiles | None = None, folder: Path | None = None
) -> tuple[Config, list[str]]:
    """Return the settings with train.compile=true or false, and a line for the log if `auto` is off on a CPU.

    Every rank must call it alike. The decision is recorded in `folder`, of a run or of a group of trials, and kept by
    later starts. Raises UserError if it was true and a rank cannot compile now.
    """
    if config.train.compile != "auto":
        return config, []
    before = None if folder is None or ranks.rank > 0 else compiled_before(folder)
    known = from_rank_0(-1 if before is None else int(before), ranks)
    reason = None if known == 0 else why_not(config, ranks.device, base or CheckpointFiles(config.model.path))
    if known == 1 and reason is not None:
        raise UserError(
            f"this run is compiled since its first start (train.compile=auto), which is not possible now: {reason}; "
            f"or set compile: false under train in {folder}/config.yaml, which changes the last bits of the results"
        )
    failed = max_over_ranks(-1 if reason is None else ranks.rank, ranks)
    compiles = known != 0 and failed < 0
    if known == 0:
        reason = "as since the first start of this run"
    elif failed >= 0 and reason is None:
        reason = f"rank {failed} cannot compile (logs/rank_{failed}.log)"
    if known < 0 and folder is not None:
        record(folder, ranks, compiles=compiles)
    line = f"train.compile=auto is off: {reason}"
    if ranks.rank > 0 and not compiles:
        print(line, flush=True)
    says = not compiles and ranks.device.type == "cpu"
    return config.with_settings({"train.compile": compiles}), [line] if says else []


def record(folder: Path, ranks: Ranks, *, compiles: bool) -> None:
    """Record the decision of a run's first start, on rank 0."""
    if ranks.rank == 0:
        atomic_io.write_json(folder / COMPILED_NAME, {"train.compile": compiles})


def why_not(config: Config, device: torch.device, base: CheckpointFiles) -> str | None:
    """Return why train.compile=auto is off on this rank; None if it is on, and the functions are compiled."""
    if device.type != "cpu":
        return "it is for CPUs"
    if config.adapter.method == "full":
        return "adapter=full trains the scales of norms, whose gradients it leaves out"
    architecture = architecture_of(base.config, base.folder / "config.json")
    if not architecture.fusible:
        return f"{architecture.model_type} computes other norms, MLPs or rotary embeddings than what is compiled"
    return fused_modules.why_not_compiled()
