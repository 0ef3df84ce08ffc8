"""Decide train.compile=auto and the path of a CPU's products once per run, alike on every rank.

Both are recorded, so that a resume has the same bits.
"""

from __future__ import annotations

from pathlib import Path

import torch

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.spec import architecture_of
from distlora.config import AdapterConfig, Config, RolloutConfig, UserError, require
from distlora.model import fused_modules
from distlora.parallel import Ranks, from_rank_0, max_over_ranks
from distlora.run_folder.layout import COMPILED_NAME, cannot_continue, compiled_before, decided_before, path_before
from distlora.system import atomic_io
from distlora_kernels import processor


def decide_compile(
    config: Config, ranks: Ranks, *, base: CheckpointFiles | None = None, folder: Path | None = None
) -> tuple[Config, list[str]]:
    """Set the CPU path of this process. Return the settings with train.compile=true or false, and lines for the log.

    Every rank must call it alike. The first start records both in `folder`, of a run or of a group of trials, and later
    starts keep them. Raises UserError, on every rank, if train.compile=auto was true and a rank cannot compile now.
    """
    lines = _use_path(folder, ranks) if ranks.device.type == "cpu" else []
    if config.train.compile != "auto":
        if folder is not None:
            record(folder, ranks)
        return config, lines
    at_first_start, reason = _recorded(folder, ranks), None
    if at_first_start is not False:
        base = base or CheckpointFiles(config.model.path)
        reason = why_not(config.adapter, config.rollout, ranks.device, base)
        failed = max_over_ranks(-1 if reason is None else ranks.rank, ranks)
        if reason is None and failed >= 0:
            reason = f"rank {failed} cannot compile (logs/rank_{failed}.log)"
    if at_first_start and folder is not None:
        require(reason is None, cannot_continue(folder, f"this node cannot: {reason}"))
    compiles = at_first_start is not False and reason is None
    if folder is not None:
        record(folder, ranks, compiles=compiles)
    line = "train.compile=auto is off" + (f": {reason}" if reason else ", as at this run's first start")
    if ranks.rank > 0 and not compiles:
        print(line, flush=True)
    is_logged = ranks.device.type == "cpu" and not compiles
    return config.with_settings({"train.compile": compiles}), [*lines, line] if is_logged else lines


def _use_path(folder: Path | None, ranks: Ranks) -> list[str]:
    """Use the path of the first start, or else one that every rank has. Return a line if a resume changes it."""
    recorded = path_before(folder) if folder is not None and ranks.rank == 0 else None
    before = from_rank_0(-1 if recorded is None else processor.PATHS.index(recorded), ranks)
    keeps = before >= 0 and processor.is_supported(processor.PATHS[before])
    processor.use(None)
    wanted = before if keeps else processor.PATHS.index(processor.path())
    path = processor.PATHS[max_over_ranks(wanted, ranks)]
    processor.use(path)
    if before < 0 or path == processor.PATHS[before]:
        return []
    return [
        f"CPU path changed from {processor.PATHS[before]} to {path}: a processor of this run does not support "
        f"{processor.PATHS[before]} (results differ by rounding; `distlora doctor` describes the paths)"
    ]


def _recorded(folder: Path | None, ranks: Ranks) -> bool | None:
    """Return the decision of the first start on every rank, as rank 0 reads it; None before it."""
    recorded = compiled_before(folder) if folder is not None and ranks.rank == 0 else None
    number = from_rank_0(-1 if recorded is None else int(recorded), ranks)
    return None if number < 0 else number == 1


def record(folder: Path, ranks: Ranks, *, compiles: bool | None = None) -> None:
    """Record the decisions of the first start, on rank 0. Raises UserError there if the opposite is recorded.

    `compiles`: train.compile=auto; None if the settings say true or false.
    """
    if ranks.rank == 0:
        if compiles is not None and compiled_before(folder) is (not compiles):
            raise UserError(
                f"train.compile=auto is {str(compiles).lower()} for this group of trials, but was not at the first "
                f"start of {folder}; continue it alone with `distlora resume {folder}`"
            )
        decided: dict[str, bool | str] = {} if compiles is None else {"train.compile": compiles}
        if ranks.device.type == "cpu":
            decided["path"] = path_before(folder) or processor.path()
        if decided:
            atomic_io.write_json(folder / COMPILED_NAME, decided_before(folder) | decided)


def why_not(adapter: AdapterConfig, rollout: RolloutConfig, device: torch.device, base: CheckpointFiles) -> str | None:
    """Return why train.compile=auto is off on this rank; None if it is on, and the functions are compiled."""
    if device.type != "cpu":
        return "it is for CPUs"
    if rollout.batch_invariant:
        return "rollout.batch_invariant=true computes each token alike with torch's operations"
    if adapter.method == "full":
        return "adapter=full trains the scales of norms, whose gradients it leaves out"
    architecture = architecture_of(base.config, base.folder / "config.json")
    if not architecture.compilable:
        return f"{architecture.model_type} computes other norms, MLPs or rotary embeddings than what is compiled"
    try:
        return fused_modules.why_not_compiled()
    except MemoryError as error:
        return str(error)
