"""Define the request of `distlora analyze intrinsic`. Imports no torch."""

from dataclasses import dataclass

from distlora.config import AdapterConfig, DataConfig, ModelConfig, ModelSpec, QuantConfig, TrainConfig, require

REQUEST_NAME, TRAININGS_NAME = "request.json", "trainings.jsonl"
"""Files of an unfinished analysis: its request, and one line per finished training."""
RESULT_NAME, REPORT_NAME, PLOT_NAME = "intrinsic.json", "report.md", "intrinsic.png"
NAMES = {
    "data.path": "--data",
    "data.eval_path": "--eval-data",
    "data.sequence_length": "--sequence-length",
    "model.path": "MODEL",
}
"""Arguments of the command, by the settings that its errors name."""
SCALINGS = ("none", "layers")
"""DID and SAID."""
MOST_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class IntrinsicRequest:
    """The request of `distlora analyze intrinsic`. Folders are absolute, defaults filled in."""

    models: tuple[tuple[str, str], ...]
    """(the model's folder, what the report calls it)."""
    data: str
    """Documents to train on: a file or a folder."""
    eval_data: str | None
    """Held-out documents; None: a tenth of `data`."""
    out: str
    """An existing folder for the results."""
    cache_dir: str
    """Cache of tokenized rows."""
    random: bool = False
    """True to train each model from random weights too."""
    scalings: tuple[str, ...] = SCALINGS
    """Ways to put the subspace into the model."""
    share: float = 0.9
    """Share of full fine-tuning's gain that the searched dimension must reach."""
    start: int = 1024
    """Dimension that the search begins with."""
    most: int = 100_000
    """The largest that it tries."""
    resolution: float = 2.0
    """It ends where the dimension is known to this factor."""
    also: tuple[int, ...] = ()
    """Dimensions that are tried besides, for the curves."""
    steps: int = 100
    """Optimizer steps of a training."""
    batch: int = 8
    """Rows of a step."""
    sequence_length: int = 128
    """Tokens in a row."""
    lr: float = 1e-3
    """The learning rate that is tried first; others are this one times powers of 3."""
    seeds: int = 2
    """Trainings of each dimension that decides, and of full fine-tuning."""

    def __post_init__(self) -> None:
        require(0 < self.share < 1, f"--share={self.share} is not a valid fraction; write a number between 0 and 1")
        require(
            1.05 <= self.resolution <= 100,
            f"--resolution={self.resolution} is not a valid factor; write 1.05 to 100",
        )
        for name in ("start", "most", "steps", "batch", "seeds"):
            require(
                getattr(self, name) > 0, f"--{name}={getattr(self, name)} is not a positive number; write 1 or more"
            )
        require(
            self.start <= self.most,
            f"--start={self.start:,} is beyond --most={self.most:,}, the largest dimension to try; lower --start",
        )
        for dimension in self.also:
            require(
                0 < dimension <= self.most,
                f"--also={dimension:,} is beyond --most={self.most:,}, the largest dimension to try; leave it out",
            )
        require(0 < self.lr < 1, f"--lr={self.lr} is not a valid learning rate; write a number between 0 and 1")
        require(
            self.sequence_length >= 2,
            f"--sequence-length={self.sequence_length} leaves no token to predict; write 2 or more",
        )
        require(
            bool(self.scalings)
            and set(self.scalings) <= set(SCALINGS)
            and len(set(self.scalings)) == len(self.scalings),
            f"--scaling={','.join(self.scalings)} is not known; write none, layers or none,layers",
        )

    def spec(self, model: str) -> ModelSpec:
        """Return a model whose parameters are all trained."""
        return ModelSpec(
            model=ModelConfig(path=model),
            quant=QuantConfig(method="none"),
            adapter=AdapterConfig(method="full"),
            dtype="fp32",
        )

    def data_settings(self) -> DataConfig:
        """Return the data settings of the documents."""
        return DataConfig(
            path=self.data,
            eval_path=self.eval_data,
            eval_fraction=0.1 if self.eval_data is None else 0.0,
            sequence_length=self.sequence_length,
            cache_dir=self.cache_dir,
        )

    def train_settings(self, seed: int = 0) -> TrainConfig:
        """Return the settings of one training."""
        return TrainConfig(
            dtype="fp32",
            max_steps=self.steps,
            global_batch=self.batch,
            micro_batch=max(1, min(self.batch, MOST_TOKENS_AT_ONCE // self.sequence_length)),
            checkpointing="none",
            seed=seed,
        )
