"""`distlora bench layer`: count the launches of a decoder layer on a GPU, and its time over the bare base products.

Nothing runs: the launches are those that `distlora plan` counts (distlora.planner.speed.launches).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from distlora.config import require
from distlora.planner.machine import machine_of
from distlora.planner.speed.launches import KernelLaunch
from distlora.planner.speed.timing import step_work
from distlora.planner.workload import Workload
from distlora.system.exit_codes import DONE
from distlora_launcher.compose.compose import compose_config
from distlora_launcher.compose.planning import planned_model
from distlora_launcher.terminal.arguments import read

MATRICES, BANDWIDTH, LAUNCH = 750e12, 3.0e12, 3e-6
"""Operations per second, bytes per second and seconds per launch of the arithmetic: an H100, not measured."""
LINEARS = ("dequantization", "products", "adapters")
"""Categories of the launches of a layer's linears."""
SETTINGS = ("recipe=qlora", "gpu=h100", "train.global_batch=1", "train.micro_batch=1")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerArguments:
    """Count the products, bytes and launches of a decoder layer on a GPU, and its time over the bare base products.

    The arithmetic takes 750 TFLOP/s, 3.0 TB/s and 3 us per launch. A base product that accumulates into the adapter's
    term reads its result first: the time is given with that read hidden behind the product, and after it.

    Example:
      distlora bench layer --tokens 2048,8192 train.checkpointing=none
    """

    settings: list[str] = field(default_factory=list)
    """setting=value: settings of `distlora train`."""
    models: tuple[str, ...] = ("llama3_8b", "llama3_70b")
    """NAME,...: models, by their names in `distlora plan --help`."""
    tokens: tuple[int, ...] = (2048, 8192)
    """M,...: tokens of a micro-batch, one document."""


def main(arguments: list[str]) -> int:
    """Print the table. Returns the exit code."""
    options = read(LayerArguments, "distlora bench layer", arguments)
    require(min(options.tokens) > 0, "--tokens takes positive numbers; write for example --tokens 2048,8192")
    cases = {
        f"{model}, M={tokens}": dict(figures(options.settings, model, tokens))
        for tokens in options.tokens
        for model in options.models
    }
    print(f"| | {' | '.join(cases)} |\n|{'--|' * (len(cases) + 1)}")
    for row in next(iter(cases.values())):
        print(f"| {row} | {' | '.join(each[row] for each in cases.values())} |")
    return DONE


def figures(settings: Sequence[str], model: str, tokens: int) -> Iterator[tuple[str, str]]:
    """Yield (row, figure) of a model's first layer, one micro-batch of one document."""
    words = [*SETTINGS, f"model={model}", f"data.sequence_length={tokens}", *settings]
    config = compose_config(words, may_lack_paths=True)
    work, planned, machine = Workload.of(config), planned_model(config), machine_of(config.gpu, config.cluster)
    plain = dataclasses.replace(work, train=dataclasses.replace(work.train, checkpointing="none"))
    for name, each in (("linears", plain), (f"layer, train.checkpointing={work.train.checkpointing}", work)):
        block = step_work(each, planned, machine).blocks[0]
        kept = LINEARS if each is plain else (*LINEARS, "elementwise")
        passes = [[launch for launch in part if launch.kind in kept] for part in (block.forward, block.backward)]
        both = [launch for part in passes for launch in part]
        yield f"{name}: launches forward / backward", " / ".join(str(_launches(part)) for part in passes)
        flops = sum(launch.flops for launch in both if launch.kind == "products")
        yield f"{name}: base products, TFLOP", f"{flops / 1e12:.2f}"
        for kind in kept:
            if kind != "products":
                nbytes = sum(launch.nbytes for launch in both if launch.kind == kind)
                yield f"{name}: {kind}, GB", f"{nbytes / 1e9:.2f}"
        rereads = sum(launch.rereads for launch in both) / BANDWIDTH
        yield f"{name}: results read again (beta = 1), GB", f"{rereads * BANDWIDTH / 1e9:.2f}"
        if each is plain:
            bare = flops / MATRICES
        hidden = sum(map(_seconds, both))
        yield f"{name}: ms, reads hidden / after", f"{hidden * 1e3:.2f} / {(hidden + rereads) * 1e3:.2f}"
        ratio = f"{hidden / bare:.3f} / {(hidden + rereads) / bare:.3f}"
        yield f"{name}: time over the bare products of forward and dX", ratio


def _launches(launches: Sequence[KernelLaunch]) -> int:
    return sum(launch.launches for launch in launches)


def _seconds(launch: KernelLaunch) -> float:
    moving = 0.0 if launch.kind == "products" else launch.nbytes / BANDWIDTH
    return max((launch.flops + launch.padding) / MATRICES, moving) + launch.launches * LAUNCH
