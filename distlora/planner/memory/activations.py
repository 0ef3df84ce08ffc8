"""Calculate the activation memory of decoder layers and LM head in each checkpointing mode, and what is recomputed.

Each storage counts once, operation by operation: those of a layer are in layer.py, those of the LM head here. With
adapter=full the gradients of a unit in its backward are here, 16-bit copies and gathered weights are not.
test_activations.py compares the sums with what autograd saves and with what is alive at a step's peak, within 5 %.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from distlora.architecture.shapes import (
    ADDED_AT_ONCE,
    WIDENED_AT_ONCE,
    logit_bytes,
    rows_at_once,
    tokens_per_chunk,
)
from distlora.architecture.spec import Architecture, LayerKind
from distlora.architecture.tokens import EMBEDDING, HEAD
from distlora.planner.decoder_sizes import INPUTS, Decoder, PlannedLayer, layers_of, linears_of
from distlora.planner.machine import Machine
from distlora.planner.memory import layer
from distlora.planner.memory.layer import (
    INDEX_BYTES,
    LayerRun,
    Operation,
    Peak,
    attention_half,
    expert_half,
    flash_accumulators,
    mlp_half,
    scaled_half,
)
from distlora.planner.model import PlannedModel
from distlora.planner.workload import Workload

Mode = Literal["none", "block", "selective", "offload"]

_H100_PROCESSORS = 132
"""Streaming multiprocessors."""
_LOSS_BYTES = 8
"""A logit of a chunk where no gradient is taken, in fp32, and log p."""
_NORM_STEPS = 20
"""Five fp32 tensors of a norm of transformers in backward, bytes a column."""
_OFFLOADED_IN_FLIGHT = 2
"""Boundary inputs on the device with `offload`: the one in use and the one on its way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """Bytes of one rank in a training step."""

    kept: float
    """On the device from forward to backward: what the blocks keep, and the rotary tables."""
    head_forward: float
    """On the device while the head is at work, after the last norm."""
    head_backward: float
    """On the device in their backward."""
    newest: float
    """Bytes of the last block's whole input beside the inputs in `kept`; a part of head_forward and head_backward."""
    working: float
    """On the device while a block is at work in backward: what it recomputes, and gradients."""
    dequantized: float
    """Part of `working`: NF4 weights as dense tensors, on the CPU and of experts without grouped products."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs(LayerRun):
    """Bytes per token of a decoder layer and the LM head, with what the settings keep."""

    scores: bool = False
    """True if a score of each token's state replaces the LM head."""
    trains_head: bool = False
    """True if the LM head is trained whole."""
    trained_columns: int = 0
    """Trained columns of the logits, if the rest of the LM head is frozen."""
    decodes_head: bool = False
    """True if the LM head is held in low bits."""
    has_reference: bool = False
    """True if every sequence runs forward a second time, without gradient (DPO)."""
    distills: bool = False
    """True if the loss compares distributions of the two passes."""

    @classmethod
    def of(cls, work: Workload, model: PlannedModel, machine: Machine, layer: PlannedLayer | None = None) -> Costs:
        """Return the costs of a decoder layer, by default of the first of the largest kind.

        Attention on a GPU is by documents if the kernel supports the model's heads (`flash_accumulators`). An unknown
        GPU counts as an H100.
        """
        shapes, settings, gpu, train = model.shapes, model.settings, machine.gpu, work.train
        largest = shapes.architecture.largest
        layer = layer or next(each for each in layers_of(work, shapes) if each.kind == largest)
        decoder, rows = layer.decoder, work.trained_rows(shapes)
        balanced = train.router_aux_loss
        if balanced is None:
            balanced = settings.get("router_aux_loss_coef", 0.001) if settings.get("output_router_logits") else 0
        trains_base = work.adapter.method == "full"
        costs = cls.planned(
            *(work, shapes, machine, decoder),
            decoder=decoder,
            linears=layer.linears,
            groups_experts=machine.is_gpu and train.dtype == "bf16" and (gpu is None or gpu.capability[0] in (9, 10)),
            balances=decoder.experts is not None and train.objective == "sft" and bool(balanced),
            scores=train.needs.labels > 0,
            trains_head=trains_base or HEAD in work.adapter.modules_to_save,
            trained_columns=len(rows.get(EMBEDDING if shapes.ties(work.adapter) else HEAD, ())),
            adds_up_gradients=work.shard_degree(machine.ranks) > 1,
            decodes_head=work.token_formats(shapes)[1] is not None,
            has_reference=train.needs.reference,
            distills=train.needs.distributions,
        )
        accumulators = 0.0
        if costs.attention == "documents":
            accumulators = flash_accumulators(
                _H100_PROCESSORS if gpu is None else gpu.processors,
                decoder.heads,
                work.tokens_at_once,
                train.micro_batch,
                deterministic=train.deterministic_attention,
            )
        remakes = "mlps" in costs.fused and not costs.is_gpu and train.checkpointing == "none"
        return replace(costs, accumulators=accumulators, remakes=remakes)

    @property
    def uncounted(self) -> list[str]:
        """Parts that are not calculated, in words; empty if there are none."""
        sentences = []
        if self.is_gpu and self.attention == "sdpa":
            sentences.append("what a GPU's attention with dense masks makes: it is taken for what the CPU's does")
        if self.has_reference:
            sentences.append("the marks of each token's pair: a few bytes for each token and pair of a row")
        return sentences

    @property
    def boundary(self) -> int:
        """The input of a block."""
        return self.itemsize * self.decoder.hidden

    @property
    def norm_keeps_input(self) -> bool:
        """True if the first norm of a half keeps the input itself and not an fp32 copy."""
        return "norms" in self.fused or self.itemsize == 4

    def attention_half(self, tokens: int = 1, row: int = 1) -> list[Operation]:
        """Return the operations of the attention half on `tokens` tokens in sequences of `row` tokens."""
        run, half = replace(self, tokens=tokens, row=row), self.decoder.halves[0]
        return attention_half(run) if half is None else scaled_half(run, half)

    def mlp_half(self, tokens: int = 1) -> list[Operation]:
        """Return the operations of the MLP half, dense or experts."""
        run, half = replace(self, tokens=tokens, row=1), self.decoder.halves[1]
        if half is not None:
            return scaled_half(run, half)
        return mlp_half(run) if self.decoder.experts is None else expert_half(run)

    def kept(self, mode: Mode, row: int = 1) -> float:
        """Return the bytes per token that a decoder layer keeps for backward, on the device or the host.

        Dense masks and scores grow with `row`, the tokens per sequence. `indices` stay on the device in any case and
        are not included if the layer or its MLP is recomputed.
        """
        attention, mlp = layer.kept(self.attention_half(row=row)), layer.kept(self.mlp_half())
        if mode == "none":
            return attention + mlp
        return self.boundary + (attention if mode == "selective" else 0)

    def stacked(self, mode: Mode) -> float:
        """Bytes of a block's adapters side by side that stay from forward to backward with what it keeps of a pass."""
        if mode not in ("none", "selective"):
            return 0
        return layer.stacked(self.attention_half()) + (layer.stacked(self.mlp_half()) if mode == "none" else 0)

    def indices(self, mode: Mode) -> int:
        """Return the bytes per token of expert row indices, which a layer's graph holds under any checkpointing."""
        experts = self.decoder.experts
        return 0 if experts is None or mode == "none" else INDEX_BYTES * experts.chosen

    @property
    def _tables(self) -> int:
        """The rotary tables, cos and sin, of all blocks together."""
        return 2 * self.itemsize * self.decoder.head_size

    def masks(self, row: int) -> int:
        """Return the bytes per token of the attention masks of all layers, each as large as the scores of one head.

        `sdpa` has boolean masks, `eager` adds them to the scores. They exist while layers run; layers that recompute
        attention keep them.
        """
        if self.attention in ("documents", "tiles"):
            return 0
        return self.decoder.masks * row * (1 if self.attention == "sdpa" else self.itemsize)

    def _masks(self, mode: Mode, row: int) -> int:
        return self.masks(row) if mode in ("block", "offload") else 0

    def working(self, mode: Mode, tokens: int, tile: int | None = None, row: int = 1, *, sliced: bool = False) -> Peak:
        """Return the most bytes of a layer in backward, beside kept activations and the incoming gradient.

        `sliced`: after other micro-batches of the step.
        """
        if sliced and self.trains_base:
            # Autograd adds up the weights' gradients of all slices before it hands them on.
            itemsize, sizes = self.itemsize if self.adds_up_gradients else 4, self.decoder
            numel = sizes.hidden * (2 * sizes.queries + 2 * sizes.keys + 3 * sizes.inner)
            once = replace(self, adds_up_gradients=False).working(mode, tokens, tile, row)
            return once.plus(itemsize * numel)
        mlp_tokens = tokens if tile is None else min(tile, tokens)
        attention, mlp = self.attention_half(tokens, row), self.mlp_half(mlp_tokens)
        of_attention, of_mlp = (
            layer.backward_peak(attention, tokens),
            layer.backward_peak(mlp, mlp_tokens),
        )
        held = tokens * layer.kept(attention) + layer.stacked(attention)
        if mode == "none":
            whole = held + tokens * layer.kept(mlp) + layer.stacked(mlp)
            return max(of_mlp.plus(held - whole), of_attention.plus(-whole))
        # Recomputed: what a half keeps, less its input, which a checkpoint keeps.
        known = tokens * self.boundary if self.norm_keeps_input else 0
        if tile is not None:
            # The half's input, which selective keeps anyway, and its gradient are the row's.
            of_mlp = of_mlp.plus((1 if mode == "selective" else 2) * tokens * self.boundary)
        if mode == "selective":
            return max(of_mlp.plus(-known if tile is None else 0), of_attention.plus(-held))
        return max(of_mlp.plus(held - known), of_attention.plus(-known))

    @property
    def norm_keeps(self) -> int:
        """Bytes per token that a norm of the hidden size keeps."""
        return int(self.norm(self.decoder.hidden).keeps)

    @property
    def _norm_steps(self) -> int:
        """Bytes per token that a norm of the hidden size takes in backward, the incoming gradient included."""
        return 3 * self.boundary if "norms" in self.fused else _NORM_STEPS * self.decoder.hidden

    def chunk(self, tokens: int) -> int:
        """Logits at once."""
        if self.scores:
            return 0
        size = tokens_per_chunk(self.decoder.vocabulary, self.logit_bytes_at_peak, on_cpu=not self.is_gpu)
        return min(tokens, size) * self.decoder.vocabulary

    @property
    def logit_bytes_at_peak(self) -> float:
        """A logit of a chunk at its peak."""
        form = self.decoder.head_form
        return logit_bytes(
            self.itemsize,
            plain=form == "plain" and not (self.trains_head or self.trained_columns),
            compiled="loss" in self.fused,
            capped=form == "softcap",
            distills=self.distills,
        )

    def head_forward(self, tokens: int) -> float:
        """Return the bytes of the LM head's forward; a frozen head computes the gradient of its input there."""
        norm = self.norm_keeps + (self.boundary if self.has_reference else 0)
        if self.scores:
            return tokens * (norm + self.boundary) + self._widened(tokens)
        if self.trains_head:
            return tokens * (norm + self.boundary) + _LOSS_BYTES * self.chunk(tokens)
        columns = 4 * self.trained_columns
        return tokens * (norm + 2 * self.boundary + columns) + self._logits(tokens)

    def _widened(self, tokens: int) -> int:
        """Return the bytes of a chunk of states in fp32, which a score takes."""
        return 0 if self.itemsize == 4 else 4 * self.decoder.hidden * min(tokens, WIDENED_AT_ONCE)

    def _logits(self, tokens: int) -> float:
        """Return the most bytes of a chunk: its logits and their gradients, or those that products take or write.

        Beside the latter there are decoded rows of a low-bit head, the sum of the input's gradient in fp32, and the
        product that is added to it.
        """
        e, vocabulary, hidden, logits = self.itemsize, self.decoder.vocabulary, self.decoder.hidden, self.chunk(tokens)
        most = self.logit_bytes_at_peak * logits
        if not self.decodes_head:
            return most
        held = e if "loss" in self.fused or self.decoder.head_form != "plain" else e % 4 + 4
        decoded = hidden * (e * rows_at_once(vocabulary, hidden) + (4 + e) * (logits // vocabulary))
        return max(most, held * logits + decoded)

    def head_backward(self, tokens: int) -> float:
        """Return the bytes of the LM head's backward, or of the backward of the norm before it.

        A frozen head scales the stored gradient in fp32. A trained head recomputes logits chunk by chunk and adds up
        its gradient in fp32, which the CPU widens in slices.
        """
        hidden = self.decoder.hidden
        norm = self.norm_keeps
        if self.scores:
            return tokens * (norm + max(2 * self.boundary, self._norm_steps)) + self._widened(tokens)
        if self.trains_head:
            b, matrix, chunk = self.itemsize, self.decoder.vocabulary * hidden, self.chunk(tokens)
            widened = 0 if self.is_gpu or b == 4 else 4 * min(matrix, max(ADDED_AT_ONCE, hidden))
            own = 4 * matrix + max(self.logit_bytes_at_peak * chunk, b * matrix + max(b * chunk, widened))
            return max(tokens * (norm + 2 * self.boundary) + own, tokens * (norm + self._norm_steps))
        scaled = 2 * self.boundary + 4 * hidden
        if self.trained_columns:
            scaled += self.boundary + 8 * self.trained_columns
        return tokens * (norm + max(scaled, self._norm_steps))

    def step(
        self,
        mode: Mode,
        *,
        at_once: int,
        kept_tokens: int | None = None,
        tile: int | None = None,
        row: int | None = None,
    ) -> Activations:
        """Return the activations of a step that runs `at_once` tokens at a time and keeps `kept_tokens` of them.

        `row`: tokens per sequence, None for one sequence of `at_once` tokens. Attention is counted with one document
        per sequence.
        """
        tokens = at_once if kept_tokens is None else kept_tokens
        row = at_once if row is None else row
        layers, kept = self.decoder.layers, self.kept(mode, row)
        offloads = mode == "offload"
        # The gradient of all tokens comes in, and those of the slices that were run before the last are kept for it.
        gradients = (2 * tokens - at_once) * self.boundary
        # The last block's whole input stays, of which the newest is a slice, and no other is on its way.
        newest = (tokens - _OFFLOADED_IN_FLIGHT * at_once) * self.boundary if offloads else 0
        kept_here = at_once * _OFFLOADED_IN_FLIGHT if offloads else tokens * layers
        working = self.working(mode, at_once, tile, row, sliced=tokens > at_once)
        return Activations(
            kept=kept_here * kept
            + layers * (tokens // at_once) * self.stacked(mode)
            + tokens * (self._tables + self._masks(mode, row) + layers * self.indices(mode)),
            head_forward=self.head_forward(tokens) + newest,
            head_backward=self.head_backward(tokens) + newest,
            newest=newest,
            working=gradients + working.bytes,
            dequantized=working.dense,
        )


_CLOSE = 0.05
"""Largest relative difference from a measurement at which a formula holds."""


def has_formula(architecture: Architecture, kind: LayerKind, half: int, *, keeps: float, row: int) -> bool:
    """Return True if the formulas hold for a half that was measured to keep so many bytes per token.

    The measurement is in bf16 on a CPU with frozen linears, `row` tokens in a sequence, and attention by documents or
    transformers' SDPA. A half with other linears than those of `INPUTS` has no formula. One with gated
    experts has, however transformers runs them.
    """
    names = [INPUTS["qkv"] + INPUTS["o"], INPUTS["gate_up"] + INPUTS["down"]][half]
    weights = [w for w in kind.weights if kind.half_of(w.path) == half and w.packs]
    known = all(
        w.kind != "fused" and (w.path.removesuffix(".weight").rpartition(".")[2] in names or w.shape[0] == 1)
        for w in weights
    )
    if not known or not weights or kind.mlp is None or (half == 0 and kind.heads is None):
        return False
    if half == 1 and kind.experts is not None:
        return "gate_up_proj" in kind.experts.weights
    decoder = Decoder.of(architecture, kind)
    run = LayerRun(decoder=decoder, linears=linears_of(decoder, kind), is_gpu=False, tokens=row, row=row)
    if half == 1:
        formulas = [layer.kept(mlp_half(run))]
    elif architecture.attention == "eager":
        # It keeps its output for the adapter of the linear after it alone.
        formulas = [layer.kept(attention_half(replace(run, attention="eager"))) - run.itemsize * decoder.queries]
    else:
        with_mask = layer.kept(attention_half(replace(run, attention="sdpa")))
        formulas = [layer.kept(attention_half(run)), with_mask, with_mask - run.itemsize * row]
    return any(abs(formula - keeps) <= _CLOSE * keeps for formula in formulas)
