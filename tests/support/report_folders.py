"""Make run folders as runs leave them, and parse a report as a browser does."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from distlora.config import Config
from distlora.config.file import as_mapping, build
from distlora.run_folder.layout import REPORT_NAME
from distlora_launcher.cli.main import main

MOMENT = 1_795_655_700.0
VOID = {"meta", "br", "img", "col", "link", "input", "base"}
PLAN = {
    "model": {"name": "llama", "model_type": "llama", "parameters": 448608, "parameters_quantized": 255744},
    "machine": {"name": "CPU", "is_gpu": False, "gpu": None, "ranks": 2, "ranks_per_machine": 2, "host_bytes": None},
    "fits": True,
    "device": {
        "total": 7_000_000,
        "peak": 7_000_000,
        "worst": "head",
        "by_kind": {"codes": 200_000, "logits": 6_800_000},
        "held": {"codes": 200_000},
        "moments": {"head": {"logits": 6_800_000}},
    },
    "host": {"while_training": 464_000_000, "machine": 644_000_000},
    "disk": {"checkpoint": 900_000, "result": 300_000},
    "wire": {"gathered": 1_000_000, "reduced": 300_000, "reduced_rows": 0, "scattered": 0},
    "time": None,
}
SUMMARY = {
    "peak_memory_bytes": 573_000_000,
    "trainable_parameters": 74_880,
    "train_seconds": 61.3,
    "tokens_per_second": 972.5,
    "memory/peak": 7_200_000,
    "memory/planned": 7_000_000,
    "memory/codes": 200_000,
    "memory/logits": 7_000_000,
    "memory_planned/codes": 200_000,
    "memory_planned/logits": 6_800_000,
    "bits_per_parameter": 4.127,
    "gathered_bytes_per_step": 1_000_000,
    "reduced_bytes_per_step": 330_000,
    "eval_loss": 2.0,
}
DATA = {
    "content": "ab" * 32,
    "splits": {
        "train": {"documents": 29, "rows": 53, "tokens": 6540, "targets": 6476, "sources": [{"path": "/d/chats.jsonl"}]}
    },
}
STATE = {
    "identity": {"base_fingerprint": "cd" * 32},
    "environment": {"ranks": 2, "device": "AVX512", "torch": "2.13.0", "train.compile": False},
}


def make_folder(run_dir: Path, *, steps: int = 40, done: bool = True, name: str = "small", **sections: Any) -> Path:
    """Write the folder of a run of 40 steps that has done `steps`, with its result if it is done."""
    values: dict[str, Any] = {
        "model": {"path": "/models/base"},
        "data": {"path": "/data.jsonl"},
        "optim": {"lr": 0.00123},
        "train": {"max_steps": 40, "eval_every": 10, "sample_every": 20, "sample_prompts": ["Hello"]},
        "name": name,
        "run_dir": str(run_dir),
    }
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(as_mapping(build(Config, values | sections))))
    write(run_dir / "plan.json", PLAN)
    write(run_dir / "data.json", DATA)
    if steps:
        write_lines(run_dir / "metrics.jsonl", metrics(steps))
        write_lines(run_dir / "samples.jsonl", [{"step": 20, "prompt": "Hello", "text": "world"}])
        checkpoint = run_dir / "checkpoints" / f"step_{steps:08d}"
        checkpoint.mkdir(parents=True)
        write(checkpoint / "state.json", STATE)
        (checkpoint / "manifest.json").write_text("{}")
    if done:
        write(run_dir / "summary.json", SUMMARY)
        (run_dir / "adapter").mkdir()
        (run_dir / "adapter" / "adapter_model.safetensors").write_bytes(b"\0" * 330_000)
    return run_dir


def reported(folder: Path) -> Page:
    """Return the page that `distlora report` writes for a run or a sweep."""
    assert main(["report", str(folder)]) == 0
    return Page((folder / REPORT_NAME).read_text(encoding="utf-8"))


def metrics(steps: int, every: int = 10) -> list[dict[str, Any]]:
    """Return lines of metrics.jsonl, with an evaluation before the first step and after every few."""
    lines: list[dict[str, Any]] = [{"step": 0, "time": MOMENT, "eval_loss": 3.0}]
    for step in range(1, steps + 1):
        moment = MOMENT + step
        figures = {"loss": 3 - step / steps, "lr": 1e-3, "grad_norm": 1 + (step % 3) / 10, "tokens_per_second": 900.0}
        lines.append({"step": step, "time": moment, **figures, "peak_memory_bytes": 500_000_000})
        if step % every == 0:
            lines.append({"step": step, "time": moment, "eval_loss": 3 - step / steps + 0.1})
    return lines


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


class Page(HTMLParser):
    """The elements and texts of a page. Raises AssertionError if elements do not close in order."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.ids: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert len(values) == len(attrs), f"an attribute of {tag} is repeated: {attrs}"
        self.elements.append((tag, values))
        if tag not in VOID:
            self.open.append(tag)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> within {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.shown.append(data)
            if "td" in self.open or "th" in self.open:
                self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        """All text that is shown."""
        return " ".join(self.shown)

    @property
    def charts(self) -> list[str]:
        """The descriptions of the drawn charts."""
        return [
            str(keys["aria-label"])
            for name, keys in self.elements
            if name == "div" and str(keys.get("class")).startswith("plot")
        ]

    def row(self, first: str) -> list[str]:
        """Return the row of a table that begins with this cell."""
        return next(row for table in self.tables for row in table if row and row[0] == first)
