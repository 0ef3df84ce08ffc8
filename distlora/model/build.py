"""Build the model from a Hugging Face config on the meta device, from transformers' classes, without ranks or weights.

The decoder is the family's module with three changes: linears of its layers are frozen (and adapted), each layer sits
in a `Block`, and the head is a `LossHead`. `distlora.derive` refuses what a model type does beyond that.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from distlora.architecture.checkpoint_files import CheckpointFiles, read_hf_config
from distlora.architecture.config_checks import check_config
from distlora.architecture.images import ImageLayout, image_layout
from distlora.architecture.kept_weights import KeptTokens, KeptWeight, kept_by, kept_tokens
from distlora.architecture.spec import Architecture, WeightKind
from distlora.architecture.targets import check_patterns, select_adapted
from distlora.architecture.tokens import EMBEDDING, HEAD, Vocabulary, vocabulary_of
from distlora.config import ModelSpec, QuantConfig, TrainConfig, require
from distlora.model.adapters import (
    DEFAULT_ADAPTER,
    AdaptedLinear,
    BlockContext,
    Rows,
    StepRows,
    TokenRows,
    adapter_parameters,
)
from distlora.model.attention import LONGEST, Documents, VarlenOp, use
from distlora.model.batch_invariant import attend
from distlora.model.by_document import ByDocument, DocumentRows
from distlora.model.embedding_noise import EmbeddingNoise
from distlora.model.experts import (
    ExpertWeight,
    balance_sums,
    balanced_positions,
    freeze_parameters,
    place_routers,
    replace_experts,
    weight_of,
)
from distlora.model.frozen_linear import FrozenLinear, fused_paths, keep_token_matrices, link_shared_inputs
from distlora.model.head_form import loss_head
from distlora.model.hf_model import made_buffers, stored_buffers, transformers_model
from distlora.model.images import Images, frozen_merger, tower_parameters
from distlora.model.layer_wrapper import Block, Reference
from distlora.model.lm_head import SCORE, SUMS, LossForm, LossHead, RewardHead
from distlora.model.packed_masks import ask_host_for_masks, masks_of_documents, rows_known
from distlora.model.paged_cache import Past, cache_name
from distlora.weights.conversion import CheckpointLayout, layout_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Weight = TypeVar("Weight", AdaptedLinear, ExpertWeight)

INNER = re.compile(r"(\.inner)+\.")
"""What wrappers of modules add to a path."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class CausalLM(nn.Module):
    """Decoder and loss head. forward(...) -> (B,) fp32 loss sums per row, or the next token's logits."""

    def __init__(
        self,
        decoder: nn.Module,
        head: LossHead,
        blocks: list[Block],
        *,
        hf_config: PretrainedConfig,
        architecture: Architecture,
        layout: CheckpointLayout,
        vocabulary: Vocabulary,
        tied: bool,
        modules_to_save: tuple[str, ...] = (),
        outside_linears: tuple[str, ...] = (),
        image_layout: ImageLayout | None = None,
        merger: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.token_rows = nn.ModuleDict(
            {matrix: TokenRows(ids, head.weight.shape[1]) for matrix, ids in vocabulary.trained.items()}
        )
        """Trained rows of embed_tokens and lm_head. A tied head uses the embedding's."""
        self.decoder = decoder
        self.head = head
        self.image_layout = image_layout
        """How the model takes images; None: it was built for text alone."""
        self.merger = merger
        """transformers' module around the decoder that takes images: tower, projector and the decoder itself."""
        self.tied_in_base = tied
        """True if config.json ties the head's weight to the embedding's."""
        self.tied = tied and not (modules_to_save or isinstance(head, RewardHead))
        """True if the head's weight is the embedding's Parameter."""
        self.modules_to_save = modules_to_save
        """Names of embed_tokens and lm_head that are trained whole and saved beside the adapters."""
        shared = EMBEDDING if self.tied else HEAD
        if (rows := self.rows_of(shared)) is not None:
            head.train_rows(rows)
        self.blocks = blocks
        """Wrapped decoder layers, in order. The decoder owns them."""
        self._fused = {INNER.sub(".", path) for path in fused_paths(self)}
        self.hf_config = hf_config
        """The decoder's settings as transformers reads them: config.json, or its text_config."""
        self.architecture = architecture
        self.layout = layout
        """Names and layout of the parameters in a checkpoint."""
        self.outside_linears = outside_linears
        """Paths of linears of the Hugging Face model that are not frozen linears here: a vision tower's, routers."""
        self.compute_dtype: torch.dtype | None = None
        """Compute dtype of trained base parameters if they are fp32 masters; otherwise None."""
        self.made_buffers: dict[str, Tensor] = {}
        """Buffers on the CPU that no checkpoint holds, by Hugging Face name."""
        self.attends_by_documents = False
        """True if a forward takes `documents` and attends to each by its length."""
        self.is_batch_invariant = False
        """True if sampling and training compute each token alike (`make_batch_invariant`)."""
        self.runs_documents_apart = any(isinstance(module, ByDocument) for module in decoder.modules())
        """True if a module of the layers runs each packed document alone."""
        self.router_aux_loss = 0.0
        """Weight of the routers' load-balancing loss in a training row's loss; 0: it is not computed."""
        self.counts_expert_tokens = False
        """True if training forwards count the tokens of each expert (BlockContext.expert_tokens)."""
        self.noise: EmbeddingNoise | None = None
        """Noise on the embeddings of training rows; None without train.neftune_alpha."""
        self.reward_tensors: list[Tensor] = []
        """Tensors of reward models beside the run's own (GRPO)."""
        self.notes: list[str] = []
        """Lines for the log about how this model computes on its device."""

    @property
    def embedding(self) -> nn.Module:
        """Return the input embedding."""
        return self.decoder.get_input_embeddings()  # type: ignore[operator]

    @property
    def final_norm(self) -> nn.Module | None:
        """Return the norm that alone follows the last decoder layer; None if something else does."""
        norm = self.architecture.norm
        return None if norm is None else self.decoder.get_submodule(norm)

    def rest(self) -> list[nn.Parameter]:
        """Return the base's parameters outside of layers, embedding and head: mostly the final norm."""
        inside = {p for module in (self.embedding, *self.blocks, self.head) for p in module.parameters()}
        return [p for p in self.decoder.parameters() if p not in inside]

    def tower(self) -> list[nn.Parameter]:
        """Return the frozen parameters that compute the features of images. Each rank holds them whole."""
        return [] if self.merger is None else list(tower_parameters(self.merger, self.decoder).values())

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor | None,
        adapter_rows: Tensor | None = None,
        past: Past | None = None,
        step_rows: StepRows | None = None,
        documents: Documents | None = None,
        losses: LossForm = SUMS,
        images: Images | None = None,
    ) -> Tensor:
        """Return (B,) fp32 loss sums, or what `losses` says, from input_ids, position_ids and labels (B, T) int64.

        Positions restart at 0 with each packed document. labels[t] is the target at position t, -100 for none.
        `adapter_rows`, `step_rows`: Rows.adapters and Rows.places. `documents` (`documents_of`) are required if the
        model attends by documents. Without them masks are made from the positions, and the host waits for those.
        `images`: those of the rows (`Images.of`); None: text alone.

        labels=None (generation): return the logits after the last position, (B, 1, vocabulary) fp32, or after
        `past.last`, (B, vocabulary), for one document per row; `past` precedes its T tokens.
        """
        reference, temperature = None, losses.temperature
        if losses.with_reference:
            has_values = any(block.started for block in self.blocks)
            reference = Reference(None if has_values else torch.full_like(input_ids[:, 0], -1))
        balanced = counted = None
        if labels is not None and torch.is_grad_enabled() and (self.router_aux_loss > 0 or self.counts_expert_tokens):
            positions = balanced_positions(labels)
            balanced = positions if self.router_aux_loss > 0 else None
            counted = positions if self.counts_expert_tokens else None
        hidden = self.hidden_states(
            input_ids, position_ids, adapter_rows, past, step_rows, documents, reference, balanced, counted, images
        )
        if temperature != 1.0:
            assert self.head.is_product, "open_rollouts refuses other logits"
            hidden = hidden / temperature
        if reference is not None:
            with torch.no_grad():
                assert self.final_norm is not None, "check_train refuses a reference"
                states = self.final_norm(reference.take())
                states = states if temperature == 1.0 else states / temperature
            return self.head(hidden, labels, states, divergence=losses.divergence)
        if labels is None and past is not None and past.last is not None:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), past.last]
        elif labels is None:
            hidden = hidden[:, -1:]
        self.head.rows = adapter_rows
        output: Tensor = self.head(hidden, labels, by_token=losses.by_token)
        if balanced is None or labels is None or losses.by_token:
            return output
        return output + self.router_aux_loss * balance_sums(self.blocks, labels, balanced)

    def logits(self, input_ids: Tensor, adapter_rows: Tensor | None = None) -> Tensor:
        """Return the logits (B, T, vocabulary) fp32 at every position of one document per row, (B, T) int64."""
        positions, device = torch.arange(input_ids.shape[1]).expand_as(input_ids), input_ids.device
        documents = self.documents_of(positions, device)
        hidden = self.hidden_states(input_ids, positions.to(device), adapter_rows, documents=documents)
        return self.head.logits(hidden.flatten(0, 1)).view(*input_ids.shape, -1)

    def documents_of(self, position_ids: Tensor, device: torch.device) -> Documents:
        """Find the packed documents for a forward on `device` from positions (B, T) on the CPU."""
        rows = DocumentRows.of(position_ids) if self.runs_documents_apart else None
        documents = Documents.of(position_ids)._replace(rows=rows)
        return documents.to(device) if self.attends_by_documents else documents

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        adapter_rows: Tensor | None = None,
        past: Past | None = None,
        step_rows: StepRows | None = None,
        documents: Documents | None = None,
        reference: Reference | None = None,
        balanced: Tensor | None = None,
        counted: Tensor | None = None,
        images: Images | None = None,
    ) -> Tensor:
        """Return the head's input (B, T, H) for (B, T) tokens.

        `reference` then holds the last layer's output of its rows. `balanced` and `counted` (B, T) bool: positions over
        which the routers collect statistics for `balance_sums`, and that count in the experts' load.
        """
        assert documents is None or past is None, "documents beside a cache"
        packed = documents.rows if documents is not None else None
        if packed is None and self.runs_documents_apart and past is None:
            packed = DocumentRows.of(position_ids)
        is_packed = None if documents is None else documents.is_packed
        if not self.attends_by_documents:
            documents = None
        for block in self.blocks:
            block.rows, block.reference = Rows(adapter_rows, step_rows, balanced, packed, counted), reference
        if past is None:
            # With a cache transformers does not look for packed documents in the positions, and they leak into each
            # other.
            blind = self.architecture.documents == "masks" and documents is None
            with rows_known(is_packed):
                masks = masks_of_documents(self.decoder, position_ids) if blind else None
            known: dict[str, Any] = {"attention_mask": masks, "use_cache": False}
        else:
            known = {"attention_mask": past.attention_mask, "use_cache": past.cache is not None}
            known[self.cache_name] = past.cache
        if documents is not None:
            known |= {"attention_mask": documents.starts, LONGEST: documents.longest}
        rows, noise = self.rows_of(EMBEDDING), None if step_rows is None else self.noise
        assert rows is None or adapter_rows is None, "trained token rows know no choice of adapters"
        if rows is None and noise is None:
            known["input_ids"] = input_ids
        else:
            embedded = self.embedding(input_ids) if rows is None else rows.embed(self.embedding, input_ids)
            if noise is not None and step_rows is not None:
                embedded = noise.add(embedded, position_ids, step_rows)
            known["inputs_embeds"] = embedded
        module: Any = self.decoder
        if images is not None:
            assert self.merger is not None, "images for a model that was built for text"
            assert self.image_layout is not None, "a merger without its layout"
            module = self.merger
            assert rows is None, "placeholders are found in embeddings as they are stored"
            assert noise is None, "placeholders are found in embeddings as they are stored"
            known = images.arguments(self.merger, self.decoder, self.image_layout, position_ids, reference, **known)
        elif past is not None and past.grid_shift is not None:
            known["position_ids"] = torch.cat([position_ids[None], (position_ids + past.grid_shift).expand(3, -1, -1)])
        else:
            known["position_ids"] = position_ids
        with rows_known(is_packed):
            return module(**known).last_hidden_state

    @property
    def cache_name(self) -> str:
        """Return the decoder's keyword for its cache."""
        return cache_name(self.decoder)

    def rows_of(self, matrix: str) -> TokenRows | None:
        """Return the trained rows of embed_tokens or lm_head; None if it has none, or the head uses the embedding's."""
        if matrix not in self.token_rows:
            return None
        rows = self.token_rows[matrix]
        assert isinstance(rows, TokenRows)
        return rows

    def attend_by_documents(self, op: VarlenOp) -> None:
        """Compute attention with `op` wherever a forward is given documents."""
        use(self.decoder, op)
        self.attends_by_documents = True

    def make_batch_invariant(self) -> None:
        """Attend alike in sampling and training from now on; their callers compute products within `batch_invariant`.

        Raises UserError for attention that is more than a softmax over a causal window.
        """
        require(
            self.architecture.attention == "sdpa" and self.architecture.varlen,
            f"rollout.batch_invariant=true: attention of {self.architecture.model_type} is more than a softmax over a "
            "causal window (caps, sinks, selected keys), which is not computed alike for any batch; leave it out",
        )
        self.attend_by_documents(attend)
        self.is_batch_invariant = True

    def tie(self) -> None:
        """Make the head's weight the embedding's Parameter again, after the model has been given memory."""
        if self.tied and self.head.kept is None:
            self.head.weight = self.embedding.get_parameter("weight")

    def hf_state_dict(self) -> dict[str, Tensor]:
        """Return every tensor of an unquantized, unadapted model's checkpoint by its name there, a tied one once."""
        parameters: dict[str, Tensor] = {self.hf_name(name): tensor for name, tensor in self.named_parameters()}
        return parameters | stored_buffers(self)

    def keep_start(self, values: Mapping[nn.Parameter, Tensor] | None = None) -> None:
        """Copy the adapters as they are now. The reference of a forward uses this copy, or these `values`."""
        for block in self.blocks:
            parameters = adapter_parameters(block).values()
            block.started = {p: p.detach().clone() if values is None else values[p] for p in parameters}

    def set_num_micro(self, num_micro: int) -> None:
        """Run every layer's batch in this many slices from now on."""
        for block in self.blocks:
            block.num_micro = num_micro

    def adapted_linears(self, adapter: str = DEFAULT_ADAPTER) -> Iterator[tuple[str, AdaptedLinear]]:
        """Yield (Hugging Face path, linear) of the linears with the adapter, in forward order."""
        return self._adapted(AdaptedLinear, adapter)

    def adapted_experts(self, adapter: str = DEFAULT_ADAPTER) -> Iterator[tuple[str, ExpertWeight]]:
        """Yield (Hugging Face name, fused expert weight) of the weights with the adapter, in forward order."""
        return self._adapted(ExpertWeight, adapter)

    def adapted_weights(self, adapter: str = DEFAULT_ADAPTER) -> Iterator[tuple[str, AdaptedLinear | ExpertWeight]]:
        """Yield (Hugging Face path, linear or fused weight) of the weights with the adapter, linears first."""
        return itertools.chain(self.adapted_linears(adapter), self.adapted_experts(adapter))

    def adapted_modules(self, adapter: str) -> Iterator[tuple[str, AdaptedLinear | ExpertWeight | LossHead]]:
        """Yield `adapted_weights`, and (path, LM head) if it has the adapter."""
        yield from self.adapted_weights(adapter)
        if adapter in self.head.adapters:
            yield self.architecture.head, self.head

    def _adapted(self, kind: type[Weight], adapter: str) -> Iterator[tuple[str, Weight]]:
        for name, module in self.named_modules():
            if isinstance(module, kind) and adapter in module.adapters:
                yield self.hf_name(name), module

    def hf_name(self, name: str) -> str:
        """Return the Hugging Face name of a module or parameter at our path.

        decoder.layers.0.inner.x becomes model.layers.0.x, or model.language_model.layers.0.x for gemma3. A fused weight
        of experts is a parameter there, not a module with a weight.
        """
        if name.startswith("head.") and isinstance(self.head, RewardHead):
            return f"{SCORE}.{name.removeprefix('head.')}"
        if name.startswith("head."):
            own = name.removeprefix("head.own.model.")
            if own != name:
                return f"{self.architecture.causal}.{own}".removeprefix(".")
            return f"{self.architecture.head}.{name.removeprefix('head.').removeprefix('matrix.')}"
        name = INNER.sub(".", name)
        if name.removesuffix(".weight") in self._fused:
            name = name.removesuffix(".weight")
        if self.image_layout is not None and name.startswith("merger."):
            return f"{self.image_layout.merger}.{name.removeprefix('merger.')}"
        return re.sub(r"^decoder\.", f"{self.architecture.decoder}.", name)


def build_model(
    spec: ModelSpec,
    train: TrainConfig | None = None,
    *,
    base: CheckpointFiles | None = None,
    sequence_length: int | None = None,
    training: bool = True,
    for_slots: bool = False,
    architecture: Architecture | None = None,
    images: ImageLayout | None = None,
) -> CausalLM:
    """Build the whole model on the meta device, adapters included.

    `train`: activation checkpointing and the router loss; TrainConfig's defaults without it. `base`: the files at
    spec.path, if the caller has read them. `sequence_length`: tokens that the model must have positions for.
    `training`: trained parameters of the base are fp32, otherwise spec.dtype. `for_slots`: no weight has an adapter,
    every linear can have some (put_trial). `architecture`, `images`: the folder's, if they are not to be looked up.

    Raises UserError for a model that cannot be trained with these settings, and if target_modules match nothing.
    """
    base = base or CheckpointFiles(spec.path)
    full = spec.adapter.method == "full"
    place = base.folder / "config.json"
    architecture = architecture or check_config(base.config, place, sequence_length=sequence_length, full=full)
    train = train or TrainConfig()
    hf_config = read_hf_config(base.folder)
    text_key = architecture.text_config
    text_config = hf_config if text_key is None else getattr(hf_config, text_key)
    vocabulary = vocabulary_of(spec, architecture)
    text_config.vocab_size = vocabulary.rows
    # Masters are fp32, and distlora.parallel makes copies in the compute dtype. Frozen weights are in spec.dtype.
    dtype = torch.float32 if full and training else DTYPES[spec.dtype]
    hf_model = transformers_model(
        hf_config, place, auto_class=architecture.auto_class, attention=architecture.attention, dtype=dtype
    )
    decoder, layout, buffers = hf_model.get_submodule(architecture.decoder), layout_of(hf_model), made_buffers(hf_model)
    ask_host_for_masks(decoder)
    layers = decoder.get_submodule(architecture.layers)
    hf_model.requires_grad_(full and training)
    if spec.images:
        images = images or image_layout(base.folder)
    merger = None if images is None else frozen_merger(hf_model, images.merger, decoder)
    whole = spec.adapter.modules_to_save
    causal, form, grown = hf_model.get_submodule(architecture.causal), architecture.head_form, vocabulary.has_grown
    head = loss_head(causal, architecture.decoder_in_causal, form, trained=full or HEAD in whole, grown=grown)
    # Follow the module, not the config: a composite model's config and its text_config may disagree.
    tied = head.weight is decoder.get_input_embeddings().weight
    tokens = KeptTokens((None, None), ())
    if spec.quant.method == "keep":
        tokens = kept_tokens(architecture, base.headers, spec.adapter.token_settings(spec.model.new_tokens))
        keep_token_matrices(decoder, architecture.embedding, head, tokens.formats, dtype=dtype)
    if whole:
        _train_whole(decoder.get_input_embeddings(), head, whole, dtype=dtype, training=training)
    outside = _outside_linears(hf_model, architecture)
    contexts = [BlockContext() for _ in layers]
    format_of, kept = formats_of(spec, base, architecture)
    if not full:
        _replace_weights(layers, contexts, spec, dtype, format_of, kept, architecture, for_slots=for_slots)
    blocks = _wrap_layers(layers, contexts, train, spec.quant, dtype, architecture)
    model = CausalLM(
        decoder,
        RewardHead(train.needs.labels, architecture.hidden) if train.needs.labels else head,
        blocks,
        hf_config=text_config,
        architecture=architecture,
        layout=layout,
        vocabulary=vocabulary,
        tied=tied,
        modules_to_save=whole,
        outside_linears=outside,
        image_layout=images,
        merger=merger,
    )
    model.made_buffers, model.notes = buffers, [*architecture.notes, *tokens.notes]
    if architecture.has_experts:
        _balance_routers(model, train)
    if training and (full or whole) and spec.dtype != "fp32":
        model.compute_dtype = DTYPES[spec.dtype]
    return model


def _outside_linears(hf_model: nn.Module, architecture: Architecture) -> tuple[str, ...]:
    """Return the paths of linears that stay as transformers builds them: a vision tower's, routers."""
    frozen = {architecture.head, *(path for path, _ in architecture.adaptable())}
    linears = (name for name, module in hf_model.named_modules() if isinstance(module, nn.Linear))
    return tuple(name for name in linears if name not in frozen)


def _balance_routers(model: CausalLM, train: TrainConfig) -> None:
    """Set the weight of the load-balancing loss, and let routers collect statistics for it."""
    layouts = [model.architecture.layer(index).experts for index in range(len(model.blocks))]
    routers = ["" if layout is None else layout.router for layout in layouts]
    weight = weight_of(train, model.hf_config)
    if weight > 0 and any(routers):
        model.router_aux_loss = weight
        place_routers(model.blocks, routers, next(layout.chosen for layout in layouts if layout is not None))


FormatOf = Callable[[str, WeightKind], str | None]
"""Returns the format of a weight of the layers, None if it is dense, by its Hugging Face name and kind."""


def formats_of(
    spec: ModelSpec, base: CheckpointFiles, architecture: Architecture
) -> tuple[FormatOf, dict[str, KeptWeight]]:
    """Return the choice of formats for a base, and the weights that are kept as the checkpoint has them."""
    kept = kept_by(spec, base, architecture)  # Sizes alone need no weights on disk, unless they are quantized.
    wanted, chosen = spec.quant.default_format, spec.quant.exceptions

    def format_of(name: str, kind: WeightKind) -> str | None:
        if name in kept:
            return kept[name].format
        # bitsandbytes leaves fused experts in 16 bits, also in a checkpoint that it has quantized.
        return None if kept and kind == "linear" else chosen.get(name, wanted)

    return format_of, kept


def _wrap_layers(
    layers: nn.ModuleList,
    contexts: list[BlockContext],
    train: TrainConfig,
    quant: QuantConfig,
    dtype: torch.dtype,
    architecture: Architecture,
) -> list[Block]:
    """Put a `Block` around each layer, and a `ByDocument` around its modules that would mix packed documents."""
    require(
        quant.dense_layers != "auto",
        "quant.dense_layers=auto stands for a number, which only `distlora train` and `distlora plan` choose; set "
        "quant.dense_layers=0 here",
    )
    blocks = []
    for index, (layer, context) in enumerate(zip(list(layers), contexts, strict=True)):
        kind = architecture.layer(index)
        for path in kind.apart:
            layer.set_submodule(path, ByDocument(layer.get_submodule(path), context))
        block = Block(layer, context, dict(kind.batch_dims))
        block.checkpointing = train.checkpointing in ("block", "offload")
        block.dense_dtype = dtype if index < quant.num_dense else None
        layers[index] = block
        blocks.append(block)
    return blocks


def _replace_weights(
    layers: nn.ModuleList,
    contexts: list[BlockContext],
    spec: ModelSpec,
    dtype: torch.dtype,
    format_of: FormatOf,
    kept: Mapping[str, KeptWeight],
    architecture: Architecture,
    *,
    for_slots: bool,
) -> None:
    """Replace the linears of the layers, and their experts, by frozen or adapted ones.

    `kept`: weights that are kept as they are shipped. `for_slots`: all linears can have adapters, and none has one yet.
    """
    targets: set[str] = set()
    if not for_slots:
        targets = set(select_adapted(spec.adapter, architecture))
        check_patterns(spec.adapter, targets)
    for index, (layer, context) in enumerate(zip(layers, contexts, strict=True)):
        kind, prefix = architecture.layer(index), f"{architecture.layer_prefix}{index}."
        formats = {weight.path: format_of(prefix + weight.path, weight.kind) for weight in kind.weights if weight.packs}
        replaced: dict[str, FrozenLinear] = {}
        for weight in kind.weights:
            if weight.kind != "linear":
                continue
            path = weight.path.removesuffix(".weight")
            linear: Any = layer.get_submodule(path)
            name, sizes = f"{prefix}{path}", (linear.in_features, linear.out_features)
            bias, format = linear.bias is not None, formats[weight.path]
            new: FrozenLinear
            if name in targets or (for_slots and not weight.no_adapter):
                new = AdaptedLinear(*sizes, bias=bias, format=format, dtype=dtype, context=context)
                if not for_slots:
                    new.add_adapter(DEFAULT_ADAPTER, spec.adapter, path=name, seed=spec.seed)
                elif spec.adapter.use_dora:
                    new.expect_magnitudes()
            else:
                new = FrozenLinear(*sizes, bias=bias, format=format, dtype=dtype)
            new.unread = (lambda context=context: context.recomputes) if path in kind.unread else None
            layer.set_submodule(path, new)
            replaced[path] = new
        link_shared_inputs(replaced)
        if kind.experts is not None:
            as_stored = {path for path in formats if (found := kept.get(prefix + path)) and found.transposed}
            fused = replace_experts(layer, formats, as_stored=as_stored, dtype=dtype, context=context)
            for path, expert_weight in fused.items():
                if (path := f"{prefix}{path}") in targets:
                    expert_weight.add_adapter(DEFAULT_ADAPTER, spec.adapter, path=path, seed=spec.seed)
        large = {weight.path: formats[weight.path] for weight in kind.weights if weight.kind == "fused"}
        freeze_parameters(layer, large, dtype=dtype)


def _train_whole(embedding: Any, head: LossHead, names: Collection[str], *, dtype: torch.dtype, training: bool) -> None:
    """Give the named modules separate parameters (on meta) instead of frozen ones, and untie the two if they are one.

    Trained ones are fp32 masters. Without `training`, all are frozen in `dtype`.
    """
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(torch.empty_like(head.weight, dtype=dtype), requires_grad=False)
    for name, module in ((EMBEDDING, embedding), (HEAD, head)):
        if name in names:
            weight = torch.empty_like(module.weight, dtype=torch.float32 if training else dtype)
            module.weight = nn.Parameter(weight, requires_grad=training)
