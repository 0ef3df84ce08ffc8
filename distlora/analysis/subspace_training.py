"""Train all parameters of a model, or coordinates in a random subspace, and read the held-out rows.

The loop is not the trainer's, which updates, saves and publishes a model's parameters. Here the parameters are a
function of what is trained, and only a loss remains. Data, loss, optimizer and schedule are a run's.

Letters: D parameters, d dimensions, M layers.
"""

import copy
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from distlora import analysis
from distlora.analysis.intrinsic import IntrinsicRequest
from distlora.architecture.checkpoint_files import read_hf_config
from distlora.config import OptimConfig, RolloutConfig
from distlora.data.loader import StepLoader
from distlora.data.prepare import prepare
from distlora.data.rows import PackedRows
from distlora.model.build import CausalLM
from distlora.parallel import Ranks
from distlora.post.divergence import Readings, evenly
from distlora.system.randomness import key_of
from distlora.training.objectives import NextToken
from distlora.training.optimizers import build_optimizer, learning_rate
from distlora.training.setup import start_model
from distlora_kernels.dropout import MASK, philox


class FlatParameters:
    """A model's parameters as one vector (D,) and their gradients as another; those of the model are views of them."""

    def __init__(self, model: CausalLM) -> None:
        named = dict(model.named_parameters())  # A tied one once.
        device = next(iter(named.values())).device
        size = sum(parameter.numel() for parameter in named.values())
        self.values = torch.empty(size, device=device)
        self.gradients = torch.zeros(size, device=device)
        first, layers = 0, []
        for name, parameter in named.items():
            assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}"
            last = first + parameter.numel()
            with torch.no_grad():
                self.values[first:last] = parameter.flatten()
            parameter.data = self.values[first:last].view_as(parameter)
            parameter.grad = self.gradients[first:last].view_as(parameter)
            layers.append((layer_of(name), first, last))
            first = last
        self.layers: dict[str, slice] = {}
        """Position of each layer: embedding, decoder layers, last norm, separate LM head."""
        for layer, parts in itertools.groupby(layers, key=lambda piece: piece[0]):
            pieces = list(parts)
            assert layer not in self.layers, f"{layer} lies in two places"
            self.layers[layer] = slice(pieces[0][1], pieces[-1][2])


def layer_of(name: str) -> str:
    """decoder.layers.3.inner.mlp.up_proj.weight -> layers.3; decoder.embed_tokens.weight -> embed_tokens."""
    if analysis.in_a_block(name):
        return f"layers.{analysis.layer_of(name)}"
    return name.removeprefix("decoder.").partition(".")[0]


class Subspace:
    """Train theta = theta_0 + sqrt(D/d) P u (DID), or the same with a factor for each layer (SAID).

    SAID (arXiv 2012.13255, section 3): theta_i = theta_0,i + lambda_i sqrt(D/d) (P u)_i, where the M factors are
    taken from the d dimensions.

    With the root an Adam step of u moves a parameter by about the learning rate, as one of full fine-tuning does,
    whatever d is: |P u| = |u| and rms(sqrt(D/d) P u) = rms(u).
    """

    def __init__(self, flat: FlatParameters, start: Tensor, *, dimension: int, seed: int, scales_layers: bool) -> None:
        self.flat, self.start = flat, start
        device, size = flat.values.device, len(flat.values)
        coordinates = dimension - (len(flat.layers) if scales_layers else 0)
        assert coordinates > 0, f"{dimension} dimensions for {len(flat.layers)} layers"
        self.projection = Projection(seed, size=size, dimension=coordinates, device=device)
        self.root = (size / coordinates) ** 0.5
        self.u = nn.Parameter(torch.zeros(coordinates, device=device))
        self.parameters = {"u": self.u}
        self.scales: nn.Parameter | None = None
        if scales_layers:
            self.scales = self.parameters["scales"] = nn.Parameter(torch.ones(len(flat.layers), device=device))
        self._moved = torch.zeros(size, device=device)
        """sqrt(D/d) P u."""

    @torch.no_grad()
    def pull(self) -> None:
        """Project the gradients of the model's parameters to u and the layer factors."""
        gradients = self.flat.gradients
        if self.scales is not None:
            layers = self.flat.layers.values()
            self.scales.grad = torch.stack([self._moved[layer] @ gradients[layer] for layer in layers])
            for layer, scale in zip(layers, self.scales, strict=True):
                gradients[layer] *= scale
        self.u.grad = self.projection.coordinates_of(gradients) * self.root

    @torch.no_grad()
    def push(self) -> None:
        """Write theta for the current u and layer factors into the model."""
        self.projection.parameters_of(self.u * self.root, out=self._moved)
        if self.scales is None:
            torch.add(self.start, self._moved, out=self.flat.values)
            return
        for layer, scale in zip(self.flat.layers.values(), self.scales, strict=True):
            torch.addcmul(self.start[layer], self._moved[layer], scale, out=self.flat.values[layer])


SIGNS_PER_COUNTER = 128
"""Four words of 32 bits. No block is shorter, so that each begins with a counter of its own."""
FACTOR_BITS = 6
"""H is applied as Kronecker factors of at most 64 x 64, which are matrix products."""
ELEMENTS_AT_ONCE = 2**20
"""Elements of P's rows computed at once; memory holds a few times as many."""
STAGES = 3


class Projection:
    """P of (D, d), of a seed; `parameters_of` and `coordinates_of` apply it and its adjoint, in fp32."""

    def __init__(self, seed: int, *, size: int, dimension: int, device: torch.device) -> None:
        assert 0 < dimension <= size, f"{dimension} dimensions of {size}"
        self.size, self.dimension, self.device = size, dimension, device
        self.bits = max(dimension - 1, SIGNS_PER_COUNTER - 1).bit_length()
        self.block = 2**self.bits
        self._key = key_of(seed, "subspace")
        self._scale = (self.block / size) ** 0.5 * self.block ** (-STAGES / 2)

    def parameters_of(self, coordinates: Tensor, out: Tensor) -> Tensor:
        """Coordinates (d,) -> P coordinates, into out (D,)."""
        padded = F.pad(coordinates * self._scale, (0, self.block - self.dimension))
        for first, rows in self._chunks():
            x = padded.expand(rows, self.block)
            for stage in range(STAGES):
                x = hadamard(x * self._signs(stage, first, rows))
            chunk = out[first : first + rows * self.block]
            chunk.copy_(x.view(-1)[: len(chunk)])
        return out

    def coordinates_of(self, parameters: Tensor) -> Tensor:
        """Parameters (D,) -> P^T parameters (d,): the adjoint, H and S being symmetric."""
        total = torch.zeros(self.block, device=self.device)
        for first, rows in self._chunks():
            chunk = parameters[first : first + rows * self.block]
            x = F.pad(chunk, (0, rows * self.block - len(chunk))).view(rows, self.block)
            for stage in reversed(range(STAGES)):
                x = hadamard(x) * self._signs(stage, first, rows)
            total += x.sum(dim=0)
        return total[: self.dimension] * self._scale

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """(first row of P, blocks) that are computed together."""
        at_once = max(1, ELEMENTS_AT_ONCE // self.block)
        blocks = -(-self.size // self.block)
        for first in range(0, blocks, at_once):
            yield first * self.block, min(at_once, blocks - first)

    def _signs(self, stage: int, first: int, rows: int) -> Tensor:
        """(rows, L) of +1 and -1: bits of Philox by the row of P, so that they depend on nothing else."""
        count = rows * self.block // SIGNS_PER_COUNTER
        index = torch.arange(count, device=self.device) + first // SIGNS_PER_COUNTER
        zero = torch.zeros_like(index)
        words = torch.stack(philox(self._key, (index & MASK, index >> 32, zero + stage, zero)), dim=1)
        octets = words.to(torch.int32).view(torch.uint8)  # The words' own bits: they are below 2^32.
        return F.embedding(octets.int(), _signs_of_octets(self.device)).view(rows, self.block)


def hadamard(x: Tensor) -> Tensor:
    """H x along the last of two dims, of 2^k elements, unnormalized: H H = 2^k."""
    rows, length = x.shape
    bits = length.bit_length() - 1
    parts = -(-bits // FACTOR_BITS)
    after = length
    for number in range(parts):
        factor = 2 ** (bits * (number + 1) // parts - bits * number // parts)
        after //= factor
        matrix = _hadamard_matrix(factor, x.device)
        x = x.reshape(-1, factor) @ matrix if after == 1 else matrix @ x.reshape(-1, factor, after)
    return x.reshape(rows, length)


@functools.cache
def _hadamard_matrix(size: int, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix


@functools.cache
def _signs_of_octets(device: torch.device) -> Tensor:
    """(256, 8): -1 where the bit is set."""
    octets = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    return 1.0 - 2.0 * (octets & 1)


MOST_EVAL_ROWS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """The settings of a training, which also identify its result."""

    model: str
    """Model name in the report."""
    random: bool
    """From random weights, of `seed`."""
    scaling: str
    """none, layers; full: everything is trained; untrained: nothing."""
    dimension: int
    """Numbers that are trained; 0: none."""
    lr: float
    seed: int
    """Seed of the subspace, the row order and random weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The result of one training."""

    loss: float | None
    """Held-out, nats per token; None where it is not finite."""
    distance: float
    """||theta - theta_0|| / ||theta_0||."""
    seconds: float
    """CPU time of the process, in seconds."""


class Bench:
    """A model and its data, to train again and again from the same start."""

    def __init__(self, request: IntrinsicRequest, folder: str, ranks: Ranks, say: Callable[[str], None]) -> None:
        self.request, self.folder, self.ranks, self.say = request, folder, ranks, say
        spec, data, train = request.spec(folder), request.data_settings(), request.train_settings()
        entry = prepare(spec.model, data, train)
        self.rows = PackedRows.open(entry, "train")
        self.held_out = evenly(PackedRows.open(entry, "eval"), MOST_EVAL_ROWS)
        self.model, _, _ = start_model(
            spec, ranks, train=train, shard_degree=ranks.world, sequence_length=data.sequence_length
        )
        self.flat = FlatParameters(self.model)
        self._pretrained = self.flat.values.detach().clone()
        self._random: tuple[int, Tensor] | None = None

    @property
    def size(self) -> int:
        """Return the number of the model's parameters."""
        return len(self.flat.values)

    def start(self, training: Training) -> Tensor:
        """theta_0."""
        if not training.random:
            return self._pretrained
        if self._random is None or self._random[0] != training.seed:
            self._random = None  # The one before goes first.
            random_weights(self.model, self.folder, training.seed)
            self._random = training.seed, self.flat.values.detach().clone()
        return self._random[1]

    def run(self, training: Training) -> Outcome:
        """Train from the start, and read the held-out rows."""
        began = time.process_time()
        start = self.start(training)
        with torch.no_grad():
            self.flat.values.copy_(start)
        if training.scaling != "untrained":
            self._train(training, start)
        readings = Readings(self.held_out, self.ranks, lambda text: None)
        readings.take(self.model, training.model)
        loss = float(readings.losses.sum()) / int(self.held_out.targets.sum())
        distance = float((self.flat.values.detach() - start).norm() / start.norm())
        return Outcome(
            loss=loss if loss < float("inf") else None,
            distance=distance,
            seconds=time.process_time() - began,
        )

    def _train(self, training: Training, start: Tensor) -> None:
        subspace = None
        if training.scaling == "full":
            theta = nn.Parameter(self.flat.values)
            theta.grad = self.flat.gradients
            parameters = {"theta": theta}
        else:
            scales_layers = training.scaling == "layers"
            subspace = Subspace(
                self.flat, start, dimension=training.dimension, seed=training.seed, scales_layers=scales_layers
            )
            parameters = subspace.parameters
        optim = OptimConfig(lr=training.lr, warmup_ratio=0.1)
        optimizer = build_optimizer(parameters, optim)
        train = self.request.train_settings(training.seed)
        objective = NextToken(train, RolloutConfig())
        loader = StepLoader(
            self.rows,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            rank=0,
            world=1,
            seed=train.seed,
            shuffle=True,
        )
        loss = torch.zeros(())
        for step in range(self.request.steps):
            batch = loader.batch(step)
            self.flat.gradients.zero_()
            for micro in batch.micro_batches:
                loss = objective.losses(self.model, micro, self.ranks.device, step).rows.sum() / objective.units(batch)
                loss.backward()
            if subspace is not None:
                subspace.pull()
            norm = clip_grad_norm_(parameters.values(), optim.max_grad_norm)
            optimizer.step(learning_rate(step, self.request.steps, optim), torch.isfinite(norm))
            if subspace is not None:
                subspace.push()
            self.say(f"  step {step + 1}/{self.request.steps}, training loss {float(loss.detach()):.3f}")


def random_weights(model: CausalLM, folder: str, seed: int) -> None:
    """Fill the model with what transformers starts a new one of this config.json with."""
    import transformers

    # A copy, because from_config writes into it.
    config = copy.deepcopy(read_hf_config(Path(folder)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto = getattr(transformers, model.architecture.auto_class)
        fresh = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
    theirs = fresh.state_dict()
    with torch.no_grad():
        for name, tensor in model.hf_state_dict().items():
            tensor.copy_(theirs[name])
