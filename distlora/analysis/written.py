"""What an analysis leaves in its folder: figures as JSON, a report, a plot; and where its figures come from."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distlora import durable


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """The files of one kind of analysis, and what makes them of its figures."""

    result: str
    """File names."""
    report: str
    plot: str
    markdown: Callable[[Mapping[str, Any]], str]
    terminal: Callable[[Mapping[str, Any]], str]
    draw: Callable[[Mapping[str, Any], Path], None]

    def show(self, out: Path, found: Mapping[str, Any]) -> None:
        """The report and the plot of what is known so far, in the folder `out`."""
        self.draw(found, out / self.plot)
        durable.write_text(out / self.report, self.markdown(found))

    def write(self, out: Path, found: Mapping[str, Any]) -> None:
        """All three files, the figures last: they say that the analysis is done. The tables go to stdout."""
        self.show(out, found)
        durable.write_text(out / self.result, json.dumps(found, indent=1) + "\n")
        print(self.terminal(found))
        print(f"\nwrote {', '.join(str(out / name) for name in (self.report, self.plot, self.result))}")


def made_on(device: torch.device, *packages: str) -> dict[str, Any]:
    """The day, the device and the versions behind figures."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "date": f"{datetime.date.today():%Y-%m-%d}",
        "device": f"{device.type} ({name})",
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }
