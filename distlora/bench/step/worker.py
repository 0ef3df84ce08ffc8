"""Train one rank of a cell whenever the parent process gives a turn, or write the files that cells start from.

stdout is for the parent, one line of JSON each: {"imported": anonymous bytes}, {"ran": class of the model}, then the
figures of each turn; or {"failed": reason}. All other output goes to stderr. A turn is a line of JSON on stdin:
{"steps": n, "count": true to count collectives}. End of file ends the cell.
"""

import contextlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import safetensors.torch
import torch
import transformers
from torch import Tensor

from distlora.architecture.config_checks import read_config
from distlora.architecture.spec import architecture_of
from distlora.bench.collectives import Collectives
from distlora.bench.host import anonymous_bytes, libraries_print_to_stderr, measurement_notes
from distlora.bench.peer_models import describe
from distlora.bench.random_inputs import packed, random_rows, write_random_checkpoint
from distlora.bench.step.compare import RANK, StepInputs, StepJob, installed
from distlora.bench.trial import Started
from distlora.checkpoint.files import write_files
from distlora.checkpoint.state import Progress
from distlora.config import Config
from distlora.config.file import build
from distlora.data.loader import StepLoader
from distlora.data.prepare import prepare
from distlora.data.rows import PackedRows
from distlora.parallel import Ranks, join_ranks
from distlora.post.merge.merge import merge_to
from distlora.post.trained import Trained, base_spec
from distlora.run_folder.expert_load import ExpertTokens
from distlora.system.exit_codes import DONE
from distlora.training.publish import weight_files
from distlora.training.reporter import Reporter
from distlora.training.setup import start_run_model
from distlora.weights.peft_folder import read_peft_adapter
from distlora_kernels.nf4_cpu import has_bitsandbytes


def _real_rows(inputs: StepInputs) -> PackedRows:
    """Return the sequences of a run's first steps, in its order."""
    config = _inputs_config(inputs, seed=0)
    rows = PackedRows.open(prepare(config.model, config.data, config.train), "train")
    batch = config.train.global_batch
    loader = StepLoader(rows, global_batch=batch, micro_batch=batch, rank=0, world=1, seed=0, shuffle=True)
    places = np.concatenate([loader.rows_of_ranks(step).reshape(-1) for step in range(inputs.steps)])
    return rows.take(places[places >= 0])


def _inputs_config(inputs: StepInputs, seed: int) -> Config:
    """Return the settings of a run that makes the sequences and an adapter."""
    data: dict[str, Any] = {"path": inputs.data or "none", "sequence_length": inputs.length}
    data |= {"cache_dir": inputs.cache_dir} if inputs.data else {}
    sections: dict[str, Any] = {
        "model": {"path": inputs.model},
        "data": data,
        "adapter": {"r": RANK, "target_modules": "all-linear"},
        "quant": {"method": "none"},
        "train": {"seed": seed, "global_batch": inputs.rows},
        "run_dir": "none",
    }
    return build(Config, sections)


PACKAGES = ("transformers", "peft", "bitsandbytes", "accelerate")
"""Packages whose versions are noted."""


def make_inputs(request: StepInputs) -> int:
    """Write the files of a problem that are missing; print the notes of the measurement."""
    with libraries_print_to_stderr():
        folder, model = Path(request.folder), Path(request.model)
        folder.mkdir(parents=True, exist_ok=True)
        settings = None if request.settings is None else json.loads(request.settings)
        if settings is not None and not model.exists():
            write_random_checkpoint(model, settings, num_shards=1)
        if request.gguf is not None and not model.exists():
            base = Trained(place=request.gguf, spec=base_spec(request.gguf, "none"), weights=None)
            merge_to(base, model, onto="trained", dtype=torch.bfloat16, say=lambda text: None)
        if request.data is not None:
            rows = _real_rows(request)
        else:
            vocabulary = architecture_of(read_config(model), model).vocabulary
            rows = random_rows(request.rows * request.steps, request.length, vocabulary)
        tensors = {name: torch.from_numpy(np.array(getattr(rows, name))) for name in ("tokens", "flags")}
        safetensors.torch.save_file(tensors, folder / f"rows_{request.length}.safetensors")
        for seed in request.seeds:
            adapter = folder / f"adapter_{seed}"
            if not adapter.exists():
                config = _inputs_config(request, seed)
                new, backend, _ = start_run_model(config, Ranks(0, 1, torch.device("cpu"), None))
                adapter.mkdir()
                write_files(adapter, weight_files(new, config.spec), backend)  # A random, B zero.
    print(measurement_notes(*filter(installed, PACKAGES)), flush=True)
    return DONE


class EndedError(Exception):
    """The parent gives no more turns."""


class Turns:
    """The turns of a process: iterate and train a step each time, or call `begin` and `end` around each step.

    `note` records the step's loss.
    """

    def __init__(self, device: torch.device, answers: TextIO) -> None:
        self._device, self._answers = device, answers
        self._left = self._untimed = 0
        self._losses: list[Tensor | float] = []
        self._times: list[tuple[float, float]] = []
        self._counting: Collectives | None = None
        self._counts = contextlib.ExitStack()

    def __iter__(self) -> Iterator[None]:
        with contextlib.suppress(EndedError):
            while True:
                self.begin()
                yield
                self.end()

    def answer(self, **values: Any) -> None:
        """Send a line of JSON to the parent."""
        print(json.dumps(values), file=self._answers, flush=True)

    def note(self, loss: Tensor | float) -> None:
        """Record the current step's loss in nats per token, of this rank or of all."""
        self._losses.append(loss.detach() if isinstance(loss, Tensor) else loss)

    def begin(self) -> None:
        """Wait for a turn and start the clock. Raises EndedError if there is none."""
        if self._left == 0:
            self._take_turn()
        self._synchronize()
        self._began = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """Stop the clock after a step."""
        self._synchronize()
        now = time.perf_counter(), time.process_time()
        if self._untimed > 0:
            self._untimed -= 1
        else:
            self._times.append((now[0] - self._began[0], now[1] - self._began[1]))
        self._left -= 1
        if self._left == 0:
            self._answer()

    def _take_turn(self) -> None:
        line = sys.stdin.readline()
        if not line:
            raise EndedError
        turn = json.loads(line)
        self._left = turn["steps"]
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            # The first step allocates the memory again that was freed after the last turn.
            self._untimed = 0 if turn["count"] else 1
            self._left += self._untimed
        self._counting = self._counts.enter_context(Collectives()) if turn["count"] else None

    def _answer(self) -> None:
        self._counts.close()
        losses = [float(loss) for loss in self._losses]
        assert len(losses) >= len(self._times), "a step without a loss"
        seconds, cpu_seconds = zip(*self._times, strict=True)
        counting, peak = self._counting, None
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.empty_cache()  # For the other cells.
        self._losses, self._times = [], []
        moved = None
        if counting is not None:
            kinds = ("gathered", "scattered", "reduced", "broadcast")
            moved = {kind: nbytes for kind in kinds if (nbytes := counting.of(kind))}
        self.answer(seconds=seconds, cpu_seconds=cpu_seconds, losses=losses, device_peak=peak, moved=moved)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


STEPS = 10**6
"""Steps of the run at a constant learning rate: more than any measurement takes."""


class Losses(Reporter):
    """A reporter that writes nothing and keeps the newest loss."""

    def __init__(self, config: Config) -> None:
        super().__init__(Path(), config, rank=1, world=2, total_steps=STEPS, progress=Progress())  # Only rank 0 writes.

    def log(
        self, step: int, metrics: Mapping[str, float], *, shown: bool = True, expert_tokens: ExpertTokens | None = None
    ) -> None:
        """Keep the loss."""
        self.newest = metrics["loss"]


def _job_config(job: StepJob, world: int) -> Config:
    """Return the settings of our run."""
    adapter = read_peft_adapter(Path(job.adapter)).settings
    sections: dict[str, Any] = {
        "model": {"path": job.model},
        "data": {"path": "none", "sequence_length": job.length},
        "adapter": adapter | {"init_from": job.adapter},
        "quant": {"method": job.base, "cache": False},
        "train": {
            "checkpointing": job.checkpointing,
            "global_batch": job.rows,
            "micro_batch": job.rows // world,
            "max_steps": STEPS,
            "save_minutes": None,
            "compile": job.compile,
        },
        "optim": {"lr": job.lr, "schedule": "constant", "warmup_ratio": 0.0},
        "tracker": {},
        "run_dir": "none",
    }
    return build(Config, sections)


def train(job: StepJob, rows: PackedRows, ranks: Ranks, turns: Turns) -> None:
    """Train with our trainer until there are no more turns."""
    config = _job_config(job, ranks.world)
    losses = Losses(config)
    trainer, trial = Started.of(config, ranks).trainer(rows, reporter=losses)
    trainer.begin([trial])
    turns.answer(ran=describe(trainer.model))
    for _ in turns:
        trainer.advance()
        turns.note(losses.newest)


def work(job: StepJob, ranks: Ranks, turns: Turns) -> None:
    """Train as the job's way until there are no more turns."""
    run: Callable[[StepJob, PackedRows, Ranks, Turns], None] = train
    if job.runs != "ours":
        from distlora.bench.step import peers

        run = getattr(peers, job.runs)
    # Libraries import these when they build the model; they are not part of a step's memory.
    getattr(transformers, architecture_of(read_config(Path(job.model)), job.model).model_class)
    has_bitsandbytes()
    on_host = ranks.device.type == "cpu" and Path("/proc/self/status").exists()
    turns.answer(imported=anonymous_bytes() if on_host else 0)
    tensors = safetensors.torch.load_file(job.data)
    run(job, packed(tensors["tokens"].numpy(), tensors["flags"].numpy()), ranks, turns)


def main(request: StepJob) -> int:
    """Run one rank of a cell until there are no more turns."""
    warnings.simplefilter("ignore")
    with os.fdopen(os.dup(1), "w") as answers, libraries_print_to_stderr():
        ranks = join_ranks()
        turns = Turns(ranks.device, answers)
        try:
            work(request, ranks, turns)
        except Exception as error:
            traceback.print_exc()
            turns.answer(failed=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        sys.stderr.flush()
        os._exit(0)  # Ranks that leave one after the other would wait for each other, or complain.
