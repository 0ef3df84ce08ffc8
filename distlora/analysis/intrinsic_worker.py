"""The worker of `distlora analyze intrinsic`: trainings, each kept as it ends, then the files and the tables."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from distlora.analysis import intrinsic as search
from distlora.analysis.intrinsic import SCALING_WORDS, TRAININGS_NAME, IntrinsicRequest, mean, record
from distlora.analysis.subspace_training import Bench, Outcome, Training
from distlora.parallel import Ranks, join_ranks
from distlora.post.divergence import let_go
from distlora.post.load_trained import made_on
from distlora.system import atomic_io
from distlora.system.progress import ProgressLines

LOST = -9.0
"""The share of a training that destroyed the model: no mean of it with others reaches anything."""


class Trainings:
    """The finished trainings by settings; a killed analysis continues from them."""

    def __init__(self, path: Path) -> None:
        self._done: dict[Training, Outcome] = {}
        self._file = atomic_io.AppendedFile(path)
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self._done[Training(**entry["training"])] = Outcome(**entry["outcome"])
            except (ValueError, KeyError, TypeError):  # Of a process that was killed while it wrote: it is done again.
                continue
        if text and not text.endswith("\n"):
            self._file.append("\n")

    @property
    def number(self) -> int:
        """Return the number of trainings that are done."""
        return len(self._done)

    def get(self, training: Training) -> Outcome | None:
        """Return the outcome of a training, None if it has not run."""
        return self._done.get(training)

    def add(self, training: Training, outcome: Outcome) -> None:
        """Keep an outcome and append it to the file."""
        self._done[training] = outcome
        entry = {"training": dataclasses.asdict(training), "outcome": dataclasses.asdict(outcome)}
        self._file.append(json.dumps(entry) + "\n")


class Arm:
    """A model from one start: its full fine-tuning, and its subspaces."""

    def __init__(
        self,
        request: IntrinsicRequest,
        bench: Bench,
        name: str,
        trainings: Trainings,
        say: ProgressLines,
        *,
        random: bool,
    ):
        self.request, self.bench, self.name, self.random = request, bench, name, random
        self.trainings, self.say = trainings, say
        self.rates = search.Rates(lambda dimension, power: self.loss("full", dimension, power, 0))
        self.rates.loss(bench.size)
        self.power = self.rates.best[bench.size]
        starts = range(request.seeds) if random else [0]
        self.untrained = [self.loss("untrained", 0, 0, seed) for seed in starts]
        self.full = [self.loss("full", bench.size, self.power, seed) for seed in range(request.seeds)]
        self.before, self.after = mean(self.untrained), mean(self.full)

    def loss(self, scaling: str, dimension: int, power: int, seed: int) -> float:
        """Return the held-out loss of a training, infinity if it is not finite."""
        loss = self.outcome(scaling, dimension, power, seed).loss
        return float("inf") if loss is None else loss

    def outcome(self, scaling: str, dimension: int, power: int, seed: int) -> Outcome:
        """Return the outcome of a training, running it if needed."""
        training = Training(
            model=self.name,
            random=self.random,
            scaling=scaling,
            dimension=dimension,
            lr=0.0 if scaling == "untrained" else float(f"{self.request.lr * search.RATE_STEP**power:.4g}"),
            seed=seed,
        )
        outcome = self.trainings.get(training)
        if outcome is None:
            self.say.line(_described(training))
            outcome = self.bench.run(training)
            self.trainings.add(training, outcome)
            loss = "not finite" if outcome.loss is None else f"{outcome.loss:.4f}"
            self.say.line(
                f"  held-out loss {loss} ({outcome.seconds:.0f} s of processor; {self.trainings.number} done)"
            )
        return outcome

    def search(self, scaling: str) -> dict[str, Any]:
        """Return the dimension that reaches the share, and every dimension that was tried."""
        request = self.request
        rates = search.Rates(lambda dimension, power: self.loss(scaling, dimension, power, 0))

        def reaches(dimension: int) -> bool:
            share = self.share_of(rates.loss(dimension))
            self.say.line(f"  d={dimension:,}: {share:.1%} of full fine-tuning's gain")
            return share >= request.share

        def mean_share(dimension: int) -> float:
            if dimension not in rates.best:
                reaches(dimension)
            power = rates.best[dimension]
            outcomes = [self.outcome(scaling, dimension, power, seed) for seed in range(request.seeds)]
            return mean([self.share_of(outcome.loss) for outcome in outcomes])

        least = 1 + (len(self.bench.flat.layers) if scaling == "layers" else 0)
        most = max(least, min(request.most, self.bench.size // 2))
        ends = search.bracket(reaches, start=request.start, least=least, most=most, resolution=request.resolution)
        for besides in request.also:
            if not least <= besides <= most:
                self.say.line(f"  d={besides:,} is left out: {SCALING_WORDS[scaling]} can have {least:,} to {most:,}")
            elif besides not in rates.best:
                reaches(besides)
        # By the mean of all seeds the ends may not be on both sides: seed 0 alone has chosen them.
        everywhere = set(
            search.settle(ends, mean_share, request.share, least=least, most=most, factor=request.resolution)
        )
        outcomes = {
            dimension: [
                self.outcome(scaling, dimension, rates.best[dimension], seed)
                for seed in range(request.seeds if dimension in everywhere else 1)
            ]
            for dimension in sorted(rates.best)
        }
        losses = {dimension: [outcome.loss for outcome in by_seed] for dimension, by_seed in outcomes.items()}
        shares = {dimension: [self.share_of(loss) for loss in by_seed] for dimension, by_seed in losses.items()}
        noise = search.deviation([by_seed for by_seed in shares.values() if LOST not in by_seed])
        crossing = search.crossing(shares, request.share)
        return {
            "dimension": crossing,
            "side": None if crossing is not None else search.side(shares, request.share),
            "noise": noise,
            "range": None
            if noise is None
            else [search.crossing(shares, request.share, shift=shift) for shift in (noise, -noise)],
            "least": least,
            "most": most,
            "points": [
                {
                    "dimension": dimension,
                    "lr": float(f"{request.lr * search.RATE_STEP ** rates.best[dimension]:.4g}"),
                    "losses": losses[dimension],
                    "shares": shares[dimension],
                    "distance": outcomes[dimension][0].distance,
                }
                for dimension in sorted(rates.best)
            ],
        }

    def share_of(self, loss: float | None) -> float:
        """Return the fraction of full fine-tuning's gain; far below 0 for a failed training."""
        return LOST if loss is None else max((self.before - loss) / (self.before - self.after), LOST)

    def figures(self) -> dict[str, Any]:
        """Return the arm's figures without its subspaces."""
        noise = search.deviation([self.full])
        return {
            "model": self.name,
            "start": "random" if self.random else "pretrained",
            "parameters": self.bench.size,
            "untrained": self.before,
            "full": self.after,
            "full_losses": self.full,
            "full_noise": noise,
            "full_lr": float(f"{self.request.lr * search.RATE_STEP**self.power:.4g}"),
            "full_distance": self.outcome("full", self.bench.size, self.power, 0).distance,
            "layers": list(self.bench.flat.layers),
            "held_out_rows": len(self.bench.held_out),
            "held_out_targets": int(self.bench.held_out.targets.sum()),
            "subspaces": {},
        }


def _described(training: Training) -> str:
    """Describe a training in one line."""
    start = "random weights" if training.random else "pretrained"
    if training.scaling == "untrained":
        return f"{training.model}, {start}: untrained"
    kind = "full" if training.scaling == "full" else f"d={training.dimension:,}, {SCALING_WORDS[training.scaling]}"
    return f"{training.model}, {start}: {kind}, lr {training.lr:g}, seed {training.seed}"


def run(request: IntrinsicRequest, ranks: Ranks | None = None) -> None:
    """Analyze all that the request asks for, tables to stdout and progress to stderr."""
    ranks = ranks or join_ranks()
    say = ProgressLines()
    out = Path(request.out)
    trainings = Trainings(out / TRAININGS_NAME)
    if trainings.number:
        say.line(f"{trainings.number} trainings are done already, {out / TRAININGS_NAME}")
    results: dict[str, Any] = describe(request, ranks)
    for folder, name in zip(request.models, request.names, strict=True):
        say.line(f"{name}: reading it and its data")
        bench = Bench(request, folder, ranks, say)
        for random in (False, True) if request.random else (False,):
            arm = Arm(request, bench, name, trainings, say, random=random)
            figures = arm.figures()
            results["arms"].append(figures)
            if figures["full"] >= figures["untrained"]:
                say.line(
                    f"{name}, {figures['start']}: full fine-tuning does not lower the held-out loss "
                    f"({figures['untrained']:.4f} to {figures['full']:.4f}), so there is no gain to compare with"
                )
                continue
            for scaling in request.scaling:
                figures["subspaces"][scaling] = arm.search(scaling)
                record(results).show(out, "intrinsic")
        del bench, arm
        let_go(ranks.device)
    record(results).write(out, "intrinsic")


def describe(request: IntrinsicRequest, ranks: Ranks) -> dict[str, Any]:
    """Return the environment of the figures."""
    names = ("share", "steps", "batch", "sequence_length", "lr", "seeds", "resolution", "random")
    return made_on(ranks.device, "torch", "transformers") | {
        "data": Path(request.data).name,
        "eval_data": None if request.eval_data is None else Path(request.eval_data).name,
        "settings": {name: getattr(request, name) for name in names},
        "arms": [],
    }
