"""Plan a run before it starts: device and host memory, disk, network traffic, operations, time, cost.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distlora.config import Config
from distlora.config.file import as_mapping
from distlora.planner.machine import Machine
from distlora.planner.memory.activations import Costs
from distlora.planner.memory.device import DeviceBytes, device_bytes
from distlora.planner.model import PlannedModel
from distlora.planner.speed.sampling import Sampling, sampling_of
from distlora.planner.speed.timing import StepFlops, StepTime, step_flops, step_time
from distlora.planner.storage import DiskBytes, HostBytes, disk_bytes, host_bytes, keeps_on_host, trained_tensors
from distlora.planner.traffic import StepBytes, step_traffic
from distlora.planner.workload import Workload, trained_together

__all__ = ["Machine", "Plan", "PlannedModel", "plan_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The needs of a run with given settings on given nodes."""

    config: Config
    """Settings of the run; of trials trained together those of the first."""
    work: Workload
    model: PlannedModel
    machine: Machine
    device: DeviceBytes
    traffic: StepBytes

    # Calculated where they are asked for: a search over settings makes hundreds of plans, and asks few of them.
    @property
    def compute(self) -> StepFlops:
        """Operations of a step."""
        return step_flops(self.work, self.model, self.machine)

    @property
    def host(self) -> HostBytes:
        """Memory of a process and of a machine on the host."""
        return host_bytes(self.work, self.model, self.machine, self.device)

    @property
    def disk(self) -> DiskBytes:
        """Disk space of the run."""
        return disk_bytes(self.work, self.model)

    @property
    def uncounted(self) -> list[str]:
        """Parts of device memory that the plan leaves out, in words; empty if there are none."""
        is_traced = self.model.images is None or self.model.images.work
        images = [] if is_traced else ["activations of the vision tower, of one image at a time"]
        return Costs.of(self.work, self.model, self.machine).uncounted + images

    @property
    def time(self) -> StepTime | None:
        """Time of a step; None if a rate of the node is unknown."""
        return step_time(self.work, self.model, self.machine)

    @property
    def sampling(self) -> Sampling | None:
        """Rollouts of the run; None if it samples no answers."""
        return sampling_of(self.config.rollout, self.work, self.model, self.machine, self.device)

    @property
    def fits(self) -> bool | None:
        """True if there is enough memory, False if not, None if the available memory is unknown."""
        return None if self.machine.usable_bytes is None else self.lacks() is None

    def lacks(self, reserve: float = 0.0) -> Literal["device", "host"] | None:
        """Return whose memory is too small to leave `reserve` (a fraction of the need) free; None for neither.

        Host memory of a node counts where the CPU is the device, for all processes together, and where the base or
        activations are offloaded from a GPU. Unknown memory counts as enough.
        """
        machine = self.machine
        if self.lacks_device(reserve):
            return "device"
        work, shards = self.work, self.work.shard_degree(machine.ranks)
        offloads = keeps_on_host(work.parallel, work.train.checkpointing, shards)
        if machine.host_bytes is None or (machine.is_gpu and not offloads):
            return None
        return "host" if self.host.workers * (1 + reserve) > machine.host_bytes else None

    def lacks_device(self, reserve: float = 0.0) -> bool:
        """Return True if GPU memory is too small. Takes a hundredth of the time of `lacks`."""
        usable = self.machine.usable_bytes if self.machine.is_gpu else None
        return usable is not None and self.device.total * (1 + reserve) > usable

    def replan(self, settings: Mapping[str, Any]) -> Plan | None:
        """Return the plan with other settings by dotted name; None for values that exclude each other."""
        config = self.config.if_valid(settings)
        return None if config is None else plan_of(config, self.model, self.machine)

    def as_json(self) -> dict[str, Any]:
        """Every figure, for a program to read: bytes and operations as integers, under names that stay."""
        machine = {
            name: getattr(self.machine, name) for name in self.machine.__dataclass_fields__ if name != "measured"
        }
        step = {name: getattr(self.traffic, name) for name in self.traffic.__dataclass_fields__}
        shapes = self.model.shapes
        return {
            "model": {
                "name": self.model.name,
                "source": self.model.source,
                "model_type": shapes.architecture.model_type,
                "parameters": shapes.numel,
                "parameters_quantized": shapes.quantized_numel(self.work.format, self.work.token_formats(shapes)),
                "parameters_trained": sum(tensor.numel for tensor in trained_tensors(self.work, shapes)),
                "blocks": shapes.num_layers,
                "hidden": shapes.hidden,
                "vocabulary": shapes.vocabulary,
                "stored_bytes": self.model.stored_bytes,
            },
            "machine": machine | {"gpu": None if self.machine.gpu is None else self.machine.gpu.name},
            "settings": as_mapping(self.config),
            "trials": len(self.work.adapters),
            "fits": self.fits,
            "device": self.device.as_json(),
            "uncounted": self.uncounted,
            "host": self.host.as_json(),
            "disk": self.disk.as_json(),
            "wire": step
            | {
                "carried": self.traffic.carried,
                "received": self.traffic.received,
                "into_machine": self.traffic.into_machine(self.machine.ranks_per_machine),
            },
            "compute": self.compute.as_json(),
            "sampling": None if (sampling := self.sampling) is None else sampling.as_json(),
            "time": None if (time := self.time) is None else time.as_json(),
        }


def plan_of(config: Config, model: PlannedModel, machine: Machine, *, trials: Sequence[Workload] = ()) -> Plan:
    """Return the plan of a run, or of trials trained together, on `machine`, whose ranks count. Reads no file."""
    work, ranks = trained_together(trials) if trials else Workload.of(config, machine.ranks), machine.ranks
    return Plan(
        config=config,
        work=work,
        model=model,
        machine=machine,
        device=device_bytes(work, model, machine),
        traffic=step_traffic(work, model.shapes, world=ranks, accumulation=work.train.accumulation(ranks)),
    )
