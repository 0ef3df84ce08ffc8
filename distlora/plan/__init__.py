"""What a run needs before it starts: memory, host memory, disk, bytes on the wire, operations, time, cost. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from distlora import wire
from distlora.config import Config
from distlora.plan.compute import StepFlops, step_flops
from distlora.plan.machine import Machine
from distlora.plan.memory import DeviceBytes, device_bytes
from distlora.plan.model import PlannedModel
from distlora.wire import StepBytes

__all__ = ["Machine", "Plan", "PlannedModel", "plan_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run with these settings needs of these machines."""

    config: Config
    model: PlannedModel
    machine: Machine
    device: DeviceBytes
    wire: StepBytes
    compute: StepFlops
    # host: HostBytes, disk: DiskBytes, time: StepTime | None follow.

    @property
    def fits(self) -> bool | None:
        """Whether a rank's memory is there; None: it is not known how much there is."""
        usable = self.machine.usable_bytes
        return None if usable is None else self.device.total <= usable


def plan_of(config: Config, model: PlannedModel, machine: Machine) -> Plan:
    """Calculated; nothing is read or started. The config's own cluster gives way to the machine's ranks."""
    ranks = machine.ranks
    return Plan(
        config=config,
        model=model,
        machine=machine,
        device=device_bytes(config, model, machine),
        wire=wire.ours(config, model.shapes, world=ranks, accumulation=config.accumulation(ranks)),
        compute=step_flops(config, model, ranks=ranks, is_gpu=machine.is_gpu),
    )
