"""`distlora serve`: compose the settings, make API keys, and run a training service until it is stopped."""

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path

from distlora.config import UserError, require
from distlora.config.checks import check_section
from distlora.config.file import build
from distlora.config.json_files import read_object
from distlora.config.serve import ServeConfig
from distlora.serving.keys import add_users
from distlora.serving.request import ServeRequest
from distlora.serving.store import read_counts
from distlora.system.atomic_io import private_folder
from distlora.system.command_worker import REQUEST_NAME, encode_call
from distlora.system.exit_codes import DONE
from distlora.system.listening import listen
from distlora.system.numbers import size
from distlora_launcher.compose.checks import check_model, check_parallel, gpu_count
from distlora_launcher.compose.compose import UNSET, compose_config, compose_section, expand_home
from distlora_launcher.compose.hub import localize
from distlora_launcher.launch.lock import holders, lock_run
from distlora_launcher.launch.workers import run_workers
from distlora_launcher.terminal.arguments import nearest_option
from distlora_launcher.terminal.output import shown

WORKER, ENTRY = "distlora.serving.worker:main", "distlora.system.command_worker"
MAX_RESTARTS = 100
"""Restarts of failed workers; users' adapters come back as of their last snapshots."""
USAGE = """usage: distlora serve model.path=MODEL [recipe=serve] [serve.SETTING=value ...] [setting=value ...]

Serve training and sampling of many users' LoRA adapters on one base, over the protocol of the Tinker SDK. The settings
are those of `distlora train` that describe a model and how it is computed, and the section `serve`.

example:
  distlora serve recipe=serve model.path=Qwen/Qwen3-8B serve.users=[ann,ben]
  TINKER_API_KEY=... TINKER_BASE_URL=http://127.0.0.1:8000 python train.py

The start prints a key for each new user once; serve.folder keeps its hash, adapters and checkpoints. SIGTERM or Ctrl-C
ends calls in flight and stops. Needs: pip install 'distlora[serve]'. docs/service.md has the rest.
"""


def main(arguments: list[str]) -> int:
    """Start the service and wait for its end. Returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE.rstrip())
        return DONE
    for word in arguments:
        if word.startswith("-"):
            raise UserError(f"there is no option {word}{nearest_option(word, ['--help'])}; settings have no dashes")
    request, processes = compose_request([expand_home(word) for word in arguments])
    folder = Path(request.serve.folder)
    private_folder(folder)
    with lock_run(folder):
        for user, key in add_users(folder, request.serve.users).items():
            print(f"API key of {user} (shown once): {key}", flush=True)
        (folder / REQUEST_NAME).write_text(encode_call(WORKER, request), encoding="utf-8")
        return run_workers(folder, processes=processes, worker_module=ENTRY, max_restarts=MAX_RESTARTS)


def describe(folder: Path, *, as_json: bool) -> str:
    """Return the state of the service of a folder, as lines for a person or as a JSON object."""
    call = read_object(folder / REQUEST_NAME, "start the service again", {"worker": str, "request": dict})
    serve = build(ServeRequest, call["request"]).serve
    machines, counts, log = holders(folder), read_counts(folder), folder / "logs" / "rank_0.log"
    if as_json:
        places = [{"host": process.host, "pid": process.pid} for process in machines]
        state = "running" if machines else "ended"
        return json.dumps({"folder": str(folder), "state": state, "machines": places, "port": serve.port, **counts})
    where = ", ".join(f"{process.host} (pid {process.pid})" for process in machines)
    lines = [f"{shown(folder)} {f'serves on {where}' if machines else 'has ended; start it again with its folder'}"]
    lines.append(f"models    {', '.join(serve.names)}")
    if machines:
        lines.append(f"address   http://{serve.host}:{serve.port}")
    lines.append(f"adapters  {counts['adapters']:,} of {counts['users']:,} users")
    lines.append(f"saved     {counts['checkpoints']:,} checkpoints, {size(counts['checkpoint_bytes'])}")
    return "\n".join([*lines, *([f"log       {shown(log)}"] if log.exists() else [])])


def compose_request(words: list[str]) -> tuple[ServeRequest, int]:
    """Return a service's settings, checked, and its number of ranks. Raises UserError for what cannot be served."""
    for name in ("starlette", "uvicorn", "tinker"):  # Found, not imported: tinker imports torch.
        require(find_spec(name) is not None, f"distlora serve needs {name}; pip install 'distlora[serve]'")
    if not any(word.startswith(("recipe=serve", "serve=")) for word in words):
        words = ["serve=default", *words]
    config = compose_config(words, may_lack_paths=True)
    require(config.model.path != UNSET, "model.path is missing; set model.path=FOLDER")
    require(
        config.cluster.launcher == "local",
        f"cluster={config.cluster.launcher} does not start services; start distlora serve inside the allocation "
        "(docs/service.md has a job script)",
    )
    require(
        config.adapter.method == "lora" and not config.adapter.use_dora,
        "distlora serve trains LoRA adapters; set adapter=lora",
    )
    settings = build(ServeConfig, compose_section("serve", words))
    check_section("serve", settings)
    if settings.port == 0:  # Chosen here: workers that are restarted must be found where they were.
        with listen(settings.host, 0) as listener:
            settings = dataclasses.replace(settings, port=listener.getsockname()[1])
    processes = config.cluster.gpus_per_node
    check_parallel(config.parallel, processes)
    require(gpu_count() in (0, processes), f"set cluster.gpus_per_node={gpu_count()}, which this node has")
    typed = config.model.path
    config = dataclasses.replace(config, model=localize(config.model))
    check_model(config)
    name = config.model.name or typed
    settings = dataclasses.replace(
        settings,
        folder=str(Path(settings.folder).absolute()),
        names=tuple(dict.fromkeys((*settings.names, name))),
        tokenizer=settings.tokenizer or name,
    )
    request = ServeRequest(
        spec=config.spec,
        train=config.train,
        parallel=config.parallel,
        shard_degree=config.shard_degree(processes),
        context=config.data.sequence_length,
        serve=settings,
    )
    return request, processes
