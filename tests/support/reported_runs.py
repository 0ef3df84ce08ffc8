"""Reports of runs."""

from __future__ import annotations

from pathlib import Path

from distlora.run_folder.layout import REPORT_NAME
from distlora_launcher.cli.main import main
from support.report_folders import Page


def reported(run_dir: Path) -> Page:
    """Return the page that the command writes."""
    assert main(["report", str(run_dir)]) == 0
    return Page((run_dir / REPORT_NAME).read_text(encoding="utf-8"))
