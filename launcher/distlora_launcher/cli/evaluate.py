"""`distlora eval RUN|MODEL ...`: what models make of a text, base, adapted and merged side by side."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distlora.architecture.config_checks import check_config, read_config
from distlora.architecture.gguf_folder import gguf_file
from distlora.architecture.low_bit_methods import BNB_NF4, quantization_method
from distlora.config import ModelConfig, ModelSpec, UserError, require
from distlora.config.base import is_hub_name, means_hub, place_of
from distlora.post.evaluate import NAMES as NAMES
from distlora.post.evaluate import EvaluateRequest, Subject, Text, check_out, held_out
from distlora.post.trained import BASE_ALONE, Named, Quant, Trained, base_spec
from distlora.system.exit_codes import require_package
from distlora.weights.peft_folder import CONFIG_NAME as ADAPTER_CONFIG
from distlora_launcher.cli import named
from distlora_launcher.compose.checks import HEAD_LINES, check_base, gpu_count, row_tokens
from distlora_launcher.compose.hub import localize, with_small_files
from distlora_launcher.launch.workers import become, check_processes, run_several
from distlora_launcher.terminal.arguments import read
from distlora_launcher.terminal.output import name_of, shown, warn

WORKER = "distlora.post.evaluate_worker:main"
MERGE_RECEIPT = "merge.json"
"""File that `distlora merge` leaves in a model's folder."""
ROWS, DRAFT_ROWS = 128, 8
"""Default numbers of rows to measure, and to continue with a draft."""


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the worker, or run several. Returns the exit code of several."""
    options = read(EvaluateRequest, "distlora eval", arguments)
    check_out(options.out)
    check_processes(options.processes)
    request = checked(options)
    names = ", ".join(subject.label for subject in request.subjects)
    on = ", ".join(request.tasks) if request.source is None else request.source.name
    warn(f"evaluating {names} on {on} (importing torch takes a few seconds)")
    if options.processes > 1:
        return run_several(WORKER, request, options.processes)
    become(WORKER, request)


def checked(options: EvaluateRequest) -> EvaluateRequest:
    """Return the request, with its models on this node.

    Raises UserError for anything that can be checked before the run.
    """
    subjects: list[Subject] = []
    runs: list[Trained] = []
    places: set[str] = set()
    for place in options.places:
        if is_trained(place):
            subject, trained = trained_subject(place, options)
            runs.append(trained)
        else:
            subject = model_subject(place, options.quant)
        same = place if means_hub(place) else str(Path(place).expanduser().resolve())
        require(same not in places, f"{place} is named twice; name each model once")
        places.add(same)
        subjects.append(subject)
    for flag, named_for in (("checkpoint", "RUN"), ("adapter", "RUN"), ("model", "adapter without its run")):
        value = getattr(options, flag)
        require(
            value is None or any((trained.run_dir is None) == (flag == "model") for trained in runs),
            f"--{flag}={value} applies to each {named_for}, and none is named; leave it out",
        )
    if not options.no_base and options.adapter != BASE_ALONE and options.draft is None:
        subjects += bases_of(runs, [subject for subject in subjects if subject.name is not None])
    dtype = options.dtype or (runs[0].spec.dtype if runs else "bf16" if gpu_count() else "fp32")
    check_tasks(options)
    draft, source = local_draft(options, subjects), None
    if not options.tasks:
        usual = ROWS if options.draft is None else DRAFT_ROWS
        rows = usual if options.rows is None else options.rows
        source = text_of(options.text, subjects[0], runs, rows=rows, sequence_length=options.sequence_length)
        require(
            draft is None or not source.images,
            f"--draft={options.draft} continues texts, and {source.name} hold images; name a text with --text FILE",
        )
        for subject in subjects:
            folder = subject.read().base
            check_config(read_config(folder), folder / "config.json", sequence_length=source.sequence_length)
    return dataclasses.replace(
        options,
        subjects=tuple(subjects),
        source=source,
        dtype=dtype,
        draft=draft,
        out=None if options.out is None else str(Path(options.out).absolute()),
        tasks_folder=None if options.tasks_folder is None else str(Path(options.tasks_folder).expanduser().absolute()),
    )


def check_tasks(options: EvaluateRequest) -> None:
    """Raise UserError for their options without --tasks, and if the harness is not installed."""
    ours, theirs = ("tasks_folder", "fewshot", "limit", "chat"), ("text", "rows", "sequence_length", "draft")
    for flag in theirs if options.tasks else ours:
        value, name = getattr(options, flag), flag.replace("_", "-")
        if options.tasks:
            reason = f"--{name}={value} has no effect with --tasks, which have their own text; leave one out"
        else:
            reason = f"--{name}={value} belongs to --tasks; add --tasks NAME, or leave it out"
        require(value is None or value is False, reason)
    if not options.tasks:
        return
    require_package("lm_eval", "--tasks")
    require(
        options.tasks_folder is None or any(Path(options.tasks_folder).expanduser().rglob("*.yaml")),
        f"--tasks-folder={options.tasks_folder} holds no YAML file of a task; name the folder that does",
    )


def local_draft(options: EvaluateRequest, subjects: Sequence[Subject]) -> str | None:
    """Return the draft's folder. Raises UserError for its options without --draft, and without exactly one target."""
    if options.draft is None:
        tokens = options.max_new_tokens
        require(tokens is None, f"--max-new-tokens={tokens} belongs to --draft; add --draft MODEL, or leave it out")
        return None
    require(len(subjects) == 1, f"--draft={options.draft} helps one model, and {len(subjects)} are named; name one")
    require(options.processes == 1, "--draft runs a merged model in one process; leave --processes out")
    (subject,) = subjects
    require(
        subject.quant == "none" or subject.name is not None,
        f"--draft={options.draft} helps a model whose weights are not quantized; name the run, which is merged for it",
    )
    draft = model_subject(options.draft, None)
    require(draft.quant == "none", f"--draft={options.draft} is stored in NF4; name a model with 16- or 32-bit weights")
    return draft.model


def is_trained(place: str) -> bool:
    """Return True for a run or an adapter, False for a model."""
    folder = Path(place).expanduser()
    return (folder / "config.yaml").is_file() or (folder / ADAPTER_CONFIG).is_file()


def trained_subject(place: str, options: EvaluateRequest) -> tuple[Subject, Trained]:
    """Return the subject of a run or an adapter."""
    is_adapter = (Path(place).expanduser() / ADAPTER_CONFIG).is_file()
    flags = Named(
        run=place,
        checkpoint=None if is_adapter else options.checkpoint,
        adapter=None if is_adapter else options.adapter,
        model=options.model if is_adapter else None,
        quant=options.quant if is_adapter else None,
    )
    name, trained = named.named(flags)
    own = trained.spec.quant.method
    require(
        is_adapter or options.quant in (None, own),
        f"--quant={options.quant}: {place} was trained with quant={own}; leave "
        "--quant out, or evaluate what `distlora merge` makes of it",
    )
    label = shown(Path(place).expanduser().absolute())
    if flags.checkpoint is not None:
        label += f" ({flags.checkpoint})"
    if flags.adapter is not None:
        label = base_label(trained) if flags.adapter == BASE_ALONE else f"{label} with {flags.adapter}"
    return Subject(label=label, kind="base" if trained.weights is None else "adapted", name=name), trained


def base_of(trained: Trained, subject: Subject) -> Subject:
    """Return the base of a trained model, in the form in which it was trained."""
    assert subject.name is not None
    if trained.run_dir is not None:
        name = dataclasses.replace(subject.name, adapter=BASE_ALONE, checkpoint=None)
        return Subject(label=base_label(trained), kind="base", name=name)
    model, method = trained.spec.model.path, trained.spec.quant.method
    assert method != "auto", "the launcher has resolved it"
    assert method != "mixed", "an adapter without its run has a base in one format"
    return Subject(label=base_label(trained), kind="base", model=model, quant=method)


def bases_of(runs: Sequence[Trained], subjects: Sequence[Subject]) -> list[Subject]:
    """Return the base of each run, equal ones once."""
    by_models: dict[tuple[object, ...], Subject] = {}
    for trained, subject in zip(runs, subjects, strict=True):
        spec = trained.spec
        key = (str(spec.path.resolve()), held_in(spec), str(spec.quant.formats), spec.model.new_tokens)
        if key not in by_models:
            base = base_of(trained, subject)
            labels = [other.label for other in by_models.values()]
            label = f"{base.label}, of {subject.label}" if base.label in labels else base.label
            by_models[key] = dataclasses.replace(base, label=label)
    return list(by_models.values())


def base_label(trained: Trained) -> str:
    """Return the base's name and storage format for the report."""
    model = trained.spec.model
    return f"base {model.name or name_of(model.path)} {held_in(trained.spec)}"


def held_in(spec: ModelSpec) -> str:
    """Return how a base is held, in words."""
    return {"nf4": "in nf4", "keep": "as shipped", "mixed": "in mixed formats"}.get(
        spec.quant.method, f"in {spec.dtype}"
    )


def model_subject(place: str, quant: Quant | None) -> Subject:
    """Return a model's folder, or a name on the hub, which is downloaded."""
    folder = Path(place).expanduser().absolute()
    path = place_of(place)
    if not is_hub_name(path) and not (folder / "config.json").is_file() and gguf_file(folder) is None:
        what = "holds neither a run, an adapter nor a model" if folder.is_dir() else "does not exist"
        raise UserError(f"{place} {what}; name a run's folder, or a model's in Hugging Face format")
    model = ModelConfig(path=path)
    with with_small_files(model) as here:
        small = Path(here.path)
        in_nf4 = quantization_method(read_config(small), small) == BNB_NF4
        require(
            quant != "none" or not in_nf4,
            f"--quant={quant}: {place} is stored in NF4; leave --quant out",
        )
        held: Quant = "nf4" if in_nf4 or quant == "nf4" else "keep" if quant == "keep" else "none"
        check_base(dataclasses.replace(base_spec(path, held), model=here))
    local = localize(model).path
    merged = (Path(local) / MERGE_RECEIPT).is_file()
    label = place if is_hub_name(path) else shown(folder)
    return Subject(
        label=label if held == "none" else f"{label} in nf4" if held == "nf4" else f"{label} as shipped",
        kind="merged" if merged else "model",
        model=local,
        quant=held,
    )


def text_of(
    place: str | None, first: Subject, runs: Sequence[Trained], *, rows: int, sequence_length: int | None = None
) -> Text:
    """Return the text of --text, or the first run's held-out text. Raises UserError if there is neither."""
    run = next((trained for trained in runs if trained.run_dir is not None), None)
    if place is None:
        require(
            run is not None,
            "without a run the text to evaluate on is not known: add --text FILE (text, jsonl, or any other format "
            "of data.path)",
        )
        assert run is not None
        assert run.run_dir is not None
        require(
            sequence_length is None,
            f"--sequence-length={sequence_length} belongs to --text; the run's held-out sequences have their length; "
            "leave it out",
        )
        return held_out(run, shown(run.run_dir), most_rows=rows)
    path, data = place_of(place), None if run is None else run.data
    shared: dict[str, Any] = {} if data is None else {"cache_dir": data.cache_dir}
    if sequence_length is None:
        folder = first.model if first.model is not None else runs[0].spec.model.path
        sequence_length = row_tokens(Path(folder)) if data is None else data.sequence_length
    text = Text(
        name=path if is_hub_name(path) else shown(Path(path)),
        path=path,
        sequence_length=sequence_length,
        most_rows=rows,
        **shared,
    )
    if data is not None and data.template is not None and holds_chats(text):
        text = dataclasses.replace(text, template=data.template)
    named.check_text(text.data())
    return text


def holds_chats(text: Text) -> bool:
    """Return True if a chat template affects how the text is read."""
    from distlora.data.sources import check_sources

    return bool(set(check_sources(text.data(), limit=HEAD_LINES)) - {"text", "prompt_completion", None})
