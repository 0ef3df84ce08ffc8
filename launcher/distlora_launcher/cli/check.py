"""`distlora check MODEL`: compare distlora with transformers and PEFT on a small model of the same layers."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass

from distlora.architecture.config_checks import CheckRequest
from distlora.config import require
from distlora.config.base import place_of
from distlora_launcher.compose.compose import compose_run
from distlora_launcher.compose.overrides import known_models
from distlora_launcher.compose.planning import planned_model
from distlora_launcher.launch.workers import become
from distlora_launcher.terminal.arguments import read


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckArguments:
    """Check that distlora computes what transformers and PEFT compute for a model, and print each difference.

    It needs config.json alone: the model is shrunk to one layer of each kind, with random weights, in fp32 on the CPU.
    `distlora train` runs the same checks, without PEFT, once for each config.json. PEFT is compared if it is installed.
    A model with a vision tower is also checked with images, if its folder has the image processor's settings.

    Exit codes: 0 all checks of text pass, 2 one fails or the model is not supported.

    example: distlora check Qwen/Qwen3-0.6B --ranks 2
    """

    model: str
    """MODEL: a folder, a name on the hub (org/name), or a name for model= (qwen3_8b)."""
    ranks: int = 1
    """N: also train three steps on N processes that share the base (up to 8)."""


def main(arguments: list[str]) -> int:
    """Find the model's config.json, then become the worker."""
    options = read(CheckArguments, "distlora check", arguments)
    require(1 <= options.ranks <= 8, f"--ranks={options.ranks} is not a number of processes; write 1 to 8")
    name = place_of(known_models().get(options.model, options.model))
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table.
        composed = compose_run([], may_lack_paths=True)
        model = planned_model(composed.config.with_settings({"model.path": name}), any_length=True)
    config, processor = json.dumps(model.settings), json.dumps(model.processor)
    request = CheckRequest(config=config, place=name, processor=processor, ranks=options.ranks)
    become("distlora.derive.check:run", request)
