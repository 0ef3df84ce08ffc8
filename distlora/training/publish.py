"""Publish a run's result for other libraries: an adapter in PEFT's format, or a Hugging Face model folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from distlora.architecture.config_checks import MODELOPT_CONFIG
from distlora.architecture.gguf_folder import NOTE_NAME
from distlora.architecture.safetensors_headers import SOURCE_DTYPES, Segment, read_header, read_headers
from distlora.architecture.tokens import tokenizer_files
from distlora.checkpoint.state import RunProgress
from distlora.config import ModelSpec, UserError
from distlora.config.json_files import object_or_empty
from distlora.loading.decomposed_adapters import plain_config, plain_tensors, trained_part
from distlora.loading.peft_format import (
    adapter_tensors,
    header_marks,
    shared_factors,
    shared_value,
    weight_files,
)
from distlora.loading.tensor_files import atomic_folder, read_into, read_rows, write_files, write_model
from distlora.model.adapters import DEFAULT_ADAPTER
from distlora.model.build import CausalLM
from distlora.parallel import Backend, from_rank_0, watch
from distlora.run_folder.layout import BEST_NAME, BEST_STEP_NAME, PUBLISHED, STATE_NAME, TEMPLATE_NAME, TRAINER_NAME
from distlora.system import atomic_io
from distlora.training.optimizers import Optimizer
from distlora.weights.initial_adapter_file import initial_adapter_path
from distlora.weights.peft_folder import CONFIG_NAME, WEIGHTS_NAME
from distlora.weights.reader import TORCH_DTYPES, Reader

COMPANIONS = (".json", ".jinja", ".txt", ".model")
"""Suffixes of the base's files that are copied to RUN/model beside the weights."""


def load_weights(
    folder: Path,
    model: CausalLM,
    backend: Backend,
    start: Mapping[str, Tensor] | None = None,
    adapter: str = DEFAULT_ADAPTER,
) -> None:
    """Load an adapter, or a whole model, from a folder. Each rank reads its rows of sharded tensors.

    `start` is the initial adapter of a PiSSA run: such a run publishes a plain LoRA, unlike its checkpoints. Raises
    UserError if the folder's tensors are not this model's.
    """
    has_adapter = (folder / WEIGHTS_NAME).is_file()
    tensors = dict(adapter_tensors(model, adapter)) if has_adapter else model.hf_state_dict()
    shared = shared_factors(model, adapter) if has_adapter else {}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shapes |= {name: pair.shape_of_copies for name, pair in shared.items()}
    stored = read_header(folder / WEIGHTS_NAME) if has_adapter else read_headers(folder)
    plain = {} if start is None or (folder / STATE_NAME).is_file() else start
    odd = sorted(tensors.keys() ^ stored.keys()) or [
        name
        for name, segment in stored.items()
        if (segment.shape != shapes[name] and name not in plain) or segment.dtype not in SOURCE_DTYPES
    ]
    if odd:
        raise UserError(
            f"{folder} does not fit {model.hf_config.name_or_path}: {odd[0]} has another shape or type, or no place "
            f"({len(odd)} such tensors); was it trained on another model? Name that model, or put back the "
            "folder that the run wrote"
        )
    with Reader() as reader:
        for name, segment in stored.items():
            if name in plain:
                whole = reader.read([segment], 0, segment.numel).view(segment.shape)
                tensors[name].data.copy_(trained_part(name, whole, plain[name], folder))
            elif name in shared:
                whole = reader.read([segment], 0, segment.numel).view(segment.shape)
                tensors[name].data.copy_(shared_value(shared[name], whole, f"{folder}: {name}"))
            else:
                read_into(tensors[name], segment, reader, backend)


_EARLIER = "move its folder out of the run folder, then the checkpoint before it is used"


def restore(
    folder: Path,
    model: CausalLM,
    optimizer: Optimizer,
    trained: Mapping[str, nn.Parameter],
    backend: Backend,
    adapter: str = DEFAULT_ADAPTER,
) -> None:
    """Load the trained parameters and optimizer states from a checkpoint of any number of ranks.

    Raises UserError if they are not this run's.
    """
    load_weights(folder, model, backend, adapter=adapter)
    stored = read_header(folder / TRAINER_NAME, remedy=_EARLIER)
    _check_states(folder / TRAINER_NAME, stored, trained, optimizer)
    with Reader() as reader:

        def states() -> Iterator[tuple[str, Tensor]]:
            for path, segment in stored.items():
                key, _, name = path.partition("/")
                shape, first_row = torch.Size(segment.shape), 0
                if key in optimizer.per_element:
                    rows, first_row = backend.local_rows(trained[name])
                    shape = rows.shape
                state = torch.empty(shape, dtype=TORCH_DTYPES[segment.dtype])
                read_rows(state, first_row, segment, reader)
                yield path, state

        # Host memory holds one state at a time.
        optimizer.load_state_tensors(states())


_STEP = "step"
"""State of every optimizer that counts a parameter's updates: one number."""


def _check_states(
    file: Path, stored: Mapping[str, Segment], trained: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> None:
    """Refuse states that would fail at the optimizer's next step.

    An unknown parameter, a wrong size, or missing entries.
    """
    keys_by_name: dict[str, set[str]] = {}
    for path, segment in stored.items():
        key, _, name = path.partition("/")
        fits = name in trained and segment.dtype in TORCH_DTYPES
        if fits and key in optimizer.per_element:
            fits = segment.shape == tuple(trained[name].shape)
        elif fits:
            fits = segment.numel <= (1 if key == _STEP else trained[name].numel())
        if not fits:
            kind = f"{segment.dtype} {list(segment.shape)}"
            raise UserError(f"{file}: {path} of {kind} does not belong to a parameter that this run trains; {_EARLIER}")
        keys_by_name.setdefault(name, set()).add(key)
    for name, keys in keys_by_name.items():
        if missing := sorted(optimizer.states_of(name) - keys):
            raise UserError(f"{file} has no {missing[0]} of {name}; {_EARLIER}")


def finish(
    run_dir: Path,
    model: CausalLM,
    spec: ModelSpec,
    progress: RunProgress,
    chat_template: str | None,
    backend: Backend,
    adapter: str = DEFAULT_ADAPTER,
    *,
    load_best: bool,
) -> str:
    """Publish RUN/adapter (PEFT format) or RUN/model (a Hugging Face folder).

    The last state, or with `load_best` the best.

    If RUN/best is not from the best step of this run, the last state is published: a write failed, or a kill came
    before another save. Returns a description of what was saved. Every rank must call it alike.
    """
    watch.at(progress.step, "publishing the result", long=True)
    target = run_dir / PUBLISHED[spec.adapter.method]
    best = run_dir / BEST_NAME
    wants_best = load_best and progress.best_step not in (None, progress.step)
    step = object_or_empty(best / BEST_STEP_NAME).get("step") if backend.writes else None
    held = from_rank_0(step if type(step) is int else -1, backend.ranks)
    if not wants_best or not progress.published_step == progress.best_step == held:
        publish_result(target, model, spec, chat_template, backend, run_dir=run_dir, adapter=adapter)
        missed = f" (the last: the best, of step {progress.best_step}, is not in {best})" if wants_best else ""
        return f"{target}{missed}"
    with atomic_folder(target, backend) as temporary:
        if backend.writes:
            shutil.copytree(best, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns(BEST_STEP_NAME))
    return f"{target} (the best, of step {progress.best_step})"


def publish_best(
    run_dir: Path,
    model: CausalLM,
    spec: ModelSpec,
    progress: RunProgress,
    chat_template: str | None,
    backend: Backend,
    say: Callable[[str], None],
    adapter: str = DEFAULT_ADAPTER,
) -> None:
    """Save the present weights as RUN/best, and note the step in `progress`. Every rank must call it alike.

    If the write fails, a warning is logged, the run continues, and the older best is kept.
    """
    watch.at(progress.step, "keeping the best", long=True)
    step, written = progress.step, False
    try:
        publish_result(
            run_dir / BEST_NAME, model, spec, chat_template, backend, run_dir=run_dir, best_of=step, adapter=adapter
        )
        written = True
    except OSError as error:
        say(
            f"WARNING: the best so far, after step {step}, could not be written to {run_dir / BEST_NAME} "
            f"({error.strerror or error}); check that disk. Training continues"
        )
    if from_rank_0(int(written), backend.ranks):
        progress.published_step = step


def publish_result(
    target: Path,
    model: CausalLM,
    spec: ModelSpec,
    chat_template: str | None,
    backend: Backend,
    *,
    run_dir: str | Path = "",
    best_of: int | None = None,
    adapter: str = DEFAULT_ADAPTER,
) -> None:
    """Write the trained weights to a folder: an adapter in PEFT's format, or a Hugging Face model.

    `chat_template` is the one that the chats were rendered with, if it is not the base's: serving needs it, and the
    tokenizer if it has new tokens. `best_of`: the step to note in RUN/best. The folder is written atomically. Every
    rank must call it alike.
    """
    with atomic_folder(target, backend) as temporary:
        if spec.adapter.method == "full":
            # In the base's dtype, to which the fp32 masters are rounded once, here.
            dtype = model.hf_config.dtype or torch.float32
            assert isinstance(dtype, torch.dtype)
            write_model(temporary, model.hf_state_dict(), backend, dtype)
            if backend.writes:
                for path in companions_of(spec.path):
                    shutil.copy2(path, temporary / path.name)
                model.hf_config.save_pretrained(temporary)
        else:
            files = weight_files(model, spec, adapter)
            if spec.adapter.pissa:  # PEFT loads what is published onto the unchanged base.
                tensors = plain_tensors(files[WEIGHTS_NAME], initial_adapter_path(run_dir))
                files = {CONFIG_NAME: plain_config(files[CONFIG_NAME]), WEIGHTS_NAME: tensors}
            write_files(temporary, files, backend, metadata=header_marks(spec.adapter))
        if backend.writes:
            for name, content in tokenizer_files(spec).items():
                (temporary / name).write_bytes(content)
            if best_of is not None:
                atomic_io.write_json(temporary / BEST_STEP_NAME, {"step": best_of})
            if chat_template is not None:
                atomic_io.write_text(temporary / TEMPLATE_NAME, chat_template)


_RECORDS = ("merge.json", "combine.json", "export.json", MODELOPT_CONFIG, NOTE_NAME)


def companions_of(base: Path) -> list[Path]:
    """Return the files of a base's folder to copy, without its weight index and command records."""
    return [
        path
        for path in sorted(base.iterdir())
        if path.suffix in COMPANIONS and not path.name.endswith(".index.json") and path.name not in _RECORDS
    ]
