"""Count the launches of a decoder layer on a GPU, and their time over the bare base products. Nothing runs.

    python tests/tools/layer_launches.py [--models llama3_8b] [--tokens 2048,8192] [setting=value ...]

The launches are those that `distlora plan` counts. The arithmetic takes 750 TFLOP/s, 3.0 TB/s and 3 us per launch, not
measured. A base product that accumulates into the adapter's term reads its result first: the time is given with that
read hidden behind the product, and after it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence

from distlora.planner.machine import machine_of
from distlora.planner.speed.launches import KernelLaunch
from distlora.planner.speed.timing import step_work
from distlora.planner.workload import Workload
from distlora_launcher.compose.compose import compose_config
from distlora_launcher.compose.planning import planned_model

MATRICES, BANDWIDTH, LAUNCH = 750e12, 3.0e12, 3e-6
LINEARS = ("dequantization", "products", "adapters")
"""Categories of the launches of a layer's linears."""
SETTINGS = ("recipe=qlora", "gpu=h100", "train.global_batch=1", "train.micro_batch=1")


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
        counts = (str(sum(launch.launches for launch in part)) for part in passes)
        yield f"{name}: launches forward / backward", " / ".join(counts)
        flops = sum(launch.flops for launch in both if launch.kind == "products")
        yield f"{name}: base products, TFLOP", f"{flops / 1e12:.2f}"
        for kind in (kind for kind in kept if kind != "products"):
            nbytes = sum(launch.nbytes for launch in both if launch.kind == kind)
            yield f"{name}: {kind}, GB", f"{nbytes / 1e9:.2f}"
        rereads = sum(launch.rereads for launch in both) / BANDWIDTH
        yield f"{name}: results read again (beta = 1), GB", f"{rereads * BANDWIDTH / 1e9:.2f}"
        if each is plain:
            bare = flops / MATRICES
        hidden = sum(map(seconds, both))
        yield f"{name}: ms, reads hidden / after", f"{hidden * 1e3:.2f} / {(hidden + rereads) * 1e3:.2f}"
        ratio = f"{hidden / bare:.3f} / {(hidden + rereads) / bare:.3f}"
        yield f"{name}: time over the bare products of forward and dX", ratio


def seconds(launch: KernelLaunch) -> float:
    """Return the time of a launch by the arithmetic."""
    moving = 0.0 if launch.kind == "products" else launch.nbytes / BANDWIDTH
    return max((launch.flops + launch.padding) / MATRICES, moving) + launch.launches * LAUNCH


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="setting=value", help="settings of `distlora train`")
    parser.add_argument(
        "--models", default="llama3_8b,llama3_70b", help="names in `distlora plan --help` (%(default)s)"
    )
    parser.add_argument("--tokens", default="2048,8192", help="tokens of one document (%(default)s)")
    options = parser.parse_args()
    cases = {
        f"{model}, M={tokens}": dict(figures(options.settings, model, tokens))
        for tokens in map(int, options.tokens.split(","))
        for model in options.models.split(",")
    }
    print(f"| | {' | '.join(cases)} |\n|{'--|' * (len(cases) + 1)}")
    for row in next(iter(cases.values())):
        print(f"| {row} | {' | '.join(each[row] for each in cases.values())} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
