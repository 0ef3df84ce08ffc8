"""The operations of a mixture of experts in the place of a block's MLP, as block_memory.py has a dense one's.

    norm, router, rows of the chosen experts, linear (X, X A^T), act(gate) up, linear (P, P A^T), weighted sum

A token has a row in each expert that it chooses (kernels/distlora_kernels/operands.py: Routing), so all rows
together are `chosen` a token, however the router spreads them. Experts that run one after the other (on the CPU, and on
GPUs without grouped products) have one expert's weight dense at a time, whatever its rows: nothing here depends on
balanced routing. Routers are frozen, and their inputs are not kept.
"""

from __future__ import annotations

from distlora.planner.memory.block_memory import BlockRun, Moment, Operation
from distlora.planner.traffic import GROUP_WEIGHTS

_BLOCK = 64
"""Weights of an NF4 block (kernels/distlora_kernels/reference.py)."""
_RANK_MULTIPLE = 8
"""What grouped products round ranks up to."""
INDEX_BYTES = 4 * 8
"""A row's entries in a Routing: tokens, order, inverse, experts, int64."""


def expert_half(run: BlockRun) -> list[Operation]:
    """Return the operations of a mixture of experts, from attention's output to the layer's output."""
    sizes, experts, b = run.decoder, run.decoder.experts, run.itemsize
    assert experts is not None
    hidden, inner, rows = sizes.hidden, experts.inner, experts.chosen
    # The rows of a token, each its own; backward turns them into one a choice and adds them up.
    dispatch = Operation(0, (Moment(b * hidden * (rows + 1)),), b * hidden)
    return [
        run.norm(hidden),
        _router(run),
        dispatch,
        _linear(run, "gate_up_proj", hidden, 2 * inner),
        _activation(run),
        _linear(run, "down_proj", inner, hidden),
        _weighted_sum(run),
    ]


def _router(run: BlockRun) -> Operation:
    """Return the router: softmax, chosen experts and weights, the Routing, and the balance loss if there is one.

    Backward adds the gradient of its input to that of the expert rows (distlora/model/router_loss.py).
    """
    experts, b = run.decoder.experts, run.itemsize
    assert experts is not None
    chosen = experts.chosen
    of_all = 4 * experts.count + chosen * (8 + 4) + 4
    keeps = chosen * (8 + b) if experts.router == "chosen" else of_all
    balance = (b * experts.count + 8 * chosen + 4) if run.balances else 0
    made = 2 * b * run.decoder.hidden + (16 * experts.count if run.balances else 0)
    return Operation(keeps + INDEX_BYTES * chosen + balance, (Moment(made),), b * run.decoder.hidden)


def _linear(run: BlockRun, name: str, inputs: int, outputs: int) -> Operation:
    """Return the linear of all experts (experts_torch.py or experts_grouped.py).

    It makes dX of all rows, with grouped products also the adapter's part of it, dA and dB of all experts in fp32, and
    A and B in the run's dtype.
    """
    experts, b, rank = run.decoder.experts, run.itemsize, run.ranks.rank(name)
    assert experts is not None
    rows, weight = experts.chosen, inputs * outputs
    dense = 0
    if run.quantized and not run.groups_experts:
        # The weight of all experts where an expert's begins within a group, on the CPU within a block.
        is_cut = weight % (GROUP_WEIGHTS if run.device == "cuda" else _BLOCK) == 0
        dense = b * weight * (1 if is_cut else experts.count)
    if rank == 0:
        return Operation(0, (Moment(b * rows * inputs, dense=dense),), b * rows * inputs, dense=dense)
    fixed = experts.count * rank * (inputs + outputs) * (4 + b)
    if not run.groups_experts:
        made = Moment(b * rows * inputs, fixed, dense)
        return Operation(b * rows * (inputs + rank), (made,), b * rows * inputs, dense=dense)
    padded = -(-rank // _RANK_MULTIPLE) * _RANK_MULTIPLE
    sums = b * experts.count * padded * max(inputs, outputs)
    return Operation(
        b * rows * (inputs + padded),
        (Moment(b * rows * inputs, fixed + sums), Moment(2 * b * rows * inputs, fixed)),
        b * rows * inputs,
    )


def _activation(run: BlockRun) -> Operation:
    """Return the activation of gate and up, the halves of one tensor.

    It keeps that tensor and act(gate). GPT-OSS keeps the clamped gate, its sigmoid, their product, and up + 1.
    """
    experts, b = run.decoder.experts, run.itemsize
    assert experts is not None
    one = b * experts.chosen * experts.inner
    if experts.clamps:
        return Operation(6 * one, (Moment(2 * one),), 2 * one)
    return Operation(3 * one, (Moment(2 * one),), 2 * one)


def _weighted_sum(run: BlockRun) -> Operation:
    """Return the weighted sum of the experts' outputs, which are kept for the gradients of their weights.

    Backward makes three tensors of their size: the gradient of the product and of both operands.
    """
    experts, b = run.decoder.experts, run.itemsize
    assert experts is not None
    rows, hidden = experts.chosen, run.decoder.hidden
    wide = 4 if experts.router == "fp32 weights" else b
    return Operation(b * rows * hidden + wide * rows, (Moment(3 * wide * rows * hidden),), b * rows * hidden)
