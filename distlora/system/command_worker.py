"""Run the worker of a command: `python -m distlora.system.command_worker CALL`. Imports no torch.

A call is JSON: {"worker": "module:function", "request": {...}}, or a folder that holds it as request.json, which is how
several ranks get it. The function's parameter `request` is annotated with a dataclass, which the request's values are
checked against. It may return an exit code other than 0. A UserError gets the names of the command's arguments, as
NAMES of the dataclass's module has them; errors of several ranks go to the launcher.
"""

import dataclasses
import importlib
import json
import os
import signal
import sys
import typing
from pathlib import Path
from typing import Any, TypeVar

from distlora.config.errors import named_settings
from distlora.config.file import build
from distlora.system.exit_codes import DONE, run_to_exit_code
from distlora.system.progress import quieten, still

REQUEST_NAME = "request.json"
Request = TypeVar("Request")


def to_json(request: Any) -> str:
    """Return a request, a dataclass of plain values, as JSON."""
    return json.dumps(dataclasses.asdict(request))


def from_json(kind: type[Request], text: str) -> Request:
    """Return the request of type `kind` in a text of `to_json`. Raises UserError if it does not fit the type."""
    return build(kind, json.loads(text))


def encode_call(worker: str, request: Any) -> str:
    """Return the argument that has this program call `worker` ("module:function") with `request`."""
    return json.dumps({"worker": worker, "request": dataclasses.asdict(request)})


def main(argument: str) -> int:
    """Call the worker; return its exit code."""
    text = argument if argument.startswith("{") else (Path(argument) / REQUEST_NAME).read_text(encoding="utf-8")
    call = json.loads(text)
    module_name, _, name = call["worker"].partition(":")
    # Ctrl-C ends the process silently while torch is imported, which takes seconds.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with still("importing torch"):
        module = importlib.import_module(module_name)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    function = getattr(module, name)
    kind = typing.get_type_hints(function)["request"]
    names, request = getattr(sys.modules[kind.__module__], "NAMES", {}), build(kind, call["request"])
    quieten()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return run_to_exit_code(lambda: function(request) or DONE, names=names)
    with named_settings(names):
        code: int | None = function(request)
    return code or DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
