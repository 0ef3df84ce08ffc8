"""Define the request of `distlora analyze quantization`. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from distlora.config import AdapterConfig, DataConfig, ModelConfig, ModelSpec, QuantConfig, require

NAMES = {
    "data.path": "--text",
    "data.eval_path": "--text",
    "data.sequence_length": "--sequence-length",
    "model.path": "MODEL",
}
"""Arguments of the command, by the settings that its errors name."""
RESULT_NAME, REPORT_NAME, PLOT_NAME = "quantization.json", "report.md", "quantization.png"
"""Files in the result's folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationRequest:
    """One analysis. Everything is resolved: folders are absolute, defaults filled in."""

    model: str
    """The model's folder."""
    model_name: str
    """Model name in the report."""
    text: str | None
    """Documents to measure perplexity on: a file, a folder or a data set on the hub; None: weights alone."""
    text_name: str | None
    """Text name in the report."""
    out: str
    """An existing folder for the results."""
    cache_dir: str
    """Cache of tokenized rows."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute dtype, and storage dtype of unquantized weights."""
    sequence_length: int = 1024
    """Tokens in a row."""
    rows: int = 128
    """Most rows that are measured; of more, as many are taken at even distances."""
    formats: tuple[str, ...] = ()
    """Formats to measure, with the harm of each to each weight; none: NF4 and int4, without harm."""
    harm_rows: int = 32
    """Most rows that harm is measured on, in the same way."""
    held_out: bool = True
    """Whether the loss of each of `formats` is measured, for which the model is dense."""

    def __post_init__(self) -> None:
        require(self.rows > 0, f"--rows={self.rows} is not a valid number of rows; write 1 or more")
        require(
            self.sequence_length >= 2,
            f"--sequence-length={self.sequence_length} leaves no token to predict; write 2 or more",
        )
        require(self.dtype in ("bf16", "fp32"), f"--dtype={self.dtype} is not known; write bf16 or fp32")

    def spec(self, quant: Literal["nf4", "none"]) -> ModelSpec:
        """Return the model; its adapter, which every model has, adds zero."""
        return ModelSpec(
            model=ModelConfig(path=self.model),
            quant=QuantConfig(method=quant, cache=False),
            adapter=AdapterConfig(r=1),
            dtype=self.dtype,
        )

    def data(self) -> DataConfig:
        """Return the data settings of the text."""
        assert self.text is not None
        return DataConfig(
            path=self.text, eval_fraction=0.0, sequence_length=self.sequence_length, cache_dir=self.cache_dir
        )
