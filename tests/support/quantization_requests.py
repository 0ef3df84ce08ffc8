"""Requests of `distlora analyze quantization` for small models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distlora.analysis.quantization import QuantizationRequest


def request_for(folder: Path, out: Path, **settings: Any) -> QuantizationRequest:
    """Return the request for the model, the text and the cache in a folder, with these settings."""
    out.mkdir(exist_ok=True)
    values: dict[str, Any] = {
        "model": str(folder / "model"),
        "model_name": "small",
        "text": str(folder / "text.jsonl"),
        "text_name": "text.jsonl",
        "out": str(out),
        "cache_dir": str(folder / "cache"),
        "dtype": "fp32",
        "sequence_length": 64,
        "rows": 8,
    }
    return QuantizationRequest(**(values | settings))
