"""`distlora serve`: compose the settings, make API keys, and run a training service until it is stopped."""

import dataclasses
from pathlib import Path

from distlora.config import UserError, require
from distlora.config.checks import check_section
from distlora.config.file import build
from distlora.config.serve import ServeConfig
from distlora.serving.keys import add_users
from distlora.serving.request import ServeRequest
from distlora.system.command_worker import REQUEST_NAME, encode_call
from distlora.system.exit_codes import DONE
from distlora_launcher.compose.checks import check_model, check_parallel, gpu_count
from distlora_launcher.compose.compose import UNSET, compose_config, compose_section, expand_home
from distlora_launcher.compose.hub import localize
from distlora_launcher.launch.workers import run_workers
from distlora_launcher.terminal.arguments import nearest_option

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
    for user, key in add_users(folder, request.serve.users).items():
        print(f"API key of {user} (shown once): {key}", flush=True)
    (folder / REQUEST_NAME).write_text(encode_call(WORKER, request), encoding="utf-8")
    return run_workers(folder, processes=processes, worker_module=ENTRY, max_restarts=MAX_RESTARTS)


def compose_request(words: list[str]) -> tuple[ServeRequest, int]:
    """Return a service's settings, checked, and its number of ranks. Raises UserError for what cannot be served."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"distlora serve needs {error.name}; pip install 'distlora[serve]'") from error
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
