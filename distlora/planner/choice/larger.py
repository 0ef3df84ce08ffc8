"""Estimate the next larger runs: a larger micro-batch, sequence, adapter rank or model. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from distlora.config import Config
from distlora.planner import plan_of
from distlora.planner.choice.choose import Choice, choose
from distlora.planner.choice.space import Settings, if_valid, micro_batches, typed, with_settings
from distlora.planner.model import PlannedModel
from distlora.system.numbers import size


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """A larger run, and what it would take."""

    what: str
    """As it is typed: `train.micro_batch=4`, `model=llama3_70b`."""
    total: int
    """Bytes of a rank."""
    fits: bool | None
    chosen_again: bool = False
    """Whether it fits with what plan=auto would choose for it, and not with this run's settings."""

    def __str__(self) -> str:
        verdict = {True: "fits", False: "does not fit", None: "is not checked"}[self.fits]
        return f"{self.what}: {size(self.total)}, {verdict}{' with other settings' if self.chosen_again else ''}"


def room(choice: Choice, larger: tuple[str, PlannedModel] | None = None) -> list[Room]:
    """Return the needs of the next larger micro-batch, sequence length, adapter rank and model.

    `larger` is the model's command-line override and the model. Chosen settings that do not fit are chosen again.
    """
    plan, config = choice.plan, choice.config
    limit, length = plan.model.settings.get("max_position_embeddings"), 2 * config.data.sequence_length
    micro = next((n for n in micro_batches(config, plan.machine) if n > config.train.micro_batch), None)
    tries: list[Settings] = [] if micro is None else [{"train.micro_batch": micro}]
    tries += [{"data.sequence_length": length}] if not isinstance(limit, int) or length <= limit else []
    tries += [{"adapter.r": 2 * config.adapter.r}] if config.adapter.method == "lora" else []
    found = [
        _room(choice, " ".join(typed(*each) for each in settings.items()), larger_run, plan.model, settings)
        for settings in tries
        if (larger_run := if_valid(config, settings)) is not None
    ]
    return found if larger is None else [*found, _room(choice, larger[0], config, larger[1], {})]


def _room(choice: Choice, what: str, config: Config, model: PlannedModel, settings: Settings) -> Room:
    plan = plan_of(config, model, choice.plan.machine)
    if plan.fits is False and config.plan.mode == "auto":
        # Of the same base, but where it is another model, for which quant=auto may become something else.
        said = config if settings else with_settings(config, {"quant.method": choice.asked.quant.method})
        again = choose(said, {*choice.fixed, *settings}, model, choice.plan.machine, reserve=choice.reserve).plan
        if again.fits:
            return Room(what=what, total=again.device.total, fits=True, chosen_again=True)
    return Room(what=what, total=plan.device.total, fits=plan.fits)
