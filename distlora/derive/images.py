"""Find how a model takes images, and prove on its shrunk composite that distlora computes as transformers does.

The type's own image processor makes the tensors. Two documents have an image of their own size each, one has none; the
packed documents are compared with each alone, and those with transformers' model.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from distlora.architecture.checkpoint_files import hf_config_of
from distlora.architecture.images import PROCESSOR_FILE, TOKEN_NAMES, ImageLayout
from distlora.architecture.spec import Architecture, Weight
from distlora.config import UserError
from distlora.derive import small_of
from distlora.derive.prove import (
    BOUNDS,
    CANNOT_RUN,
    dense_weights,
    flat,
    gradients_of,
    largest_error,
    load_ours,
    load_theirs,
    mixes_tokens,
    next_tokens,
    packed_amplification,
    positions_of,
    relative_error,
    save_random,
)
from distlora.derive.tower_work import num_features, traced_work
from distlora.model.adapters import adapter_parameters
from distlora.model.build import CausalLM
from distlora.model.hf_model import auto_class_of, decoder_path, transformers_model
from distlora.model.images import (
    TOKEN_TYPES,
    Images,
    ProcessedImage,
    attend_fast,
    features_of,
    image_names,
    merger_path,
    tower_parameters,
)
from distlora.model.lm_head import IGNORED_LABEL, SUMS, LossForm

_EPS = torch.finfo(torch.float32).eps
IMAGE_BOUNDS = {
    "tower": (0.0, "the tower's tensors are copied from the checkpoint"),
    "tower attention": (2e-5, "SDPA sums in another order than eager attention"),
    "forward": (0.0, "the base runs the same operations in the same order"),
    "forward of experts or mixers": (4 * _EPS, "experts and mixers sum in another order"),
    "loss": (1e-6, "W x + B A x is summed in another order than (W + B A) x"),
    "gradients": BOUNDS["gradients"],
    "packed loss": BOUNDS["packed loss"],
    "packed gradients": BOUNDS["packed gradients"],
    "recomputed gradients": (1e-6, "recomputation runs the same operations"),
    "reference": (0.0, "the reference pass runs the base with the same features between its layers"),
    "other pixels": (-1e-6, "the loss depends on the image"),
}
"""Largest difference of each check with images and its reason, relative to the norm of what is expected, in fp32."""

_TEXT_IDS = (5, 95)
"""Range of the ids of text in a small vocabulary of 160 tokens."""
_FIRST_SPECIAL = 100
"""First id of the special tokens there."""


def derive_images(content: str, place: str) -> str:
    """Return the JSON of the ImageLayout of {"config": config.json, "processor": the image processor's settings}.

    Raises UserError if images are not supported for the model.
    """
    began, given = time.monotonic(), json.loads(content)
    config, settings = given["config"], given["processor"]
    hf_config = hf_config_of(config, place)
    auto_class = auto_class_of(hf_config, place)
    hf_model = transformers_model(hf_config, place, auto_class=auto_class, attention="eager", dtype=torch.bfloat16)
    decoder = decoder_path(hf_model)
    full = layout_of_images(hf_model, decoder)
    if "image_processor_type" not in settings and "feature_extractor_type" not in settings:
        raise _refused(hf_config.model_type, f"the folder of {place} has no {PROCESSOR_FILE}; download it again")
    small, small_config = small_of(config, hf_model, place)
    with torch.enable_grad():
        proof = proved_images(small, small_config, settings, place)
    with tempfile.TemporaryDirectory(prefix="distlora-images-") as folder:
        processor = image_processor(settings, Path(folder), config)
    work = traced_work(hf_model, full, decoder, processor)
    told = {name: getattr(proof, name) for name in ("ahead", "deepstack", "checks")}
    return dataclasses.replace(full, **told, work=work, seconds=time.monotonic() - began).to_json()


def _refused(model_type: str, reason: str) -> UserError:
    return UserError(f"images are not supported for {model_type}: {reason}; set data.images=false to train on text")


def layout_of_images(hf_model: Any, decoder: str) -> ImageLayout:
    """Return how a transformers model takes images, but for what only running it tells.

    Raises UserError if its forward merges no features that were computed before.
    """
    config, path = hf_model.config, merger_path(hf_model, decoder)
    token = next((value for name in TOKEN_NAMES if isinstance(value := getattr(config, name, None), int)), None)
    if not path or token is None:
        raise _refused(
            config.model_type,
            "transformers has no module around its decoder that merges features of images into the embeddings",
        )
    merger = hf_model.get_submodule(path)
    parameters = tower_parameters(merger, hf_model.get_submodule(decoder))
    return ImageLayout(
        merger=path,
        token_id=token,
        names=image_names(merger),
        tower=tuple(Weight(f"{path}.{name}", tuple(parameter.shape)) for name, parameter in parameters.items()),
        has_grid=hasattr(merger, "get_rope_index"),
        reads_embedding=bool(getattr(config.get_text_config(), "hidden_size_per_layer_input", 0)),
    )


def proved_images(
    small: Architecture, config: Mapping[str, Any], settings: Mapping[str, Any], place: str
) -> ImageLayout:
    """Return the layout of a shrunk composite with the results of all checks.

    `config`: its config.json; `settings`: those of the image processor. Raises UserError with the first check that
    fails, or the reason why it cannot run.
    """
    numbered = with_own_tokens(config)
    with tempfile.TemporaryDirectory(prefix="distlora-images-") as name:
        folder, checks, last = Path(name), dict[str, float](), "start"
        try:
            theirs, layout, samples, checks["tower attention"] = composite(small, numbered, settings, place, folder)
            for last, difference in differences(small, layout, folder, theirs, samples):
                checks[last] = difference
        except CANNOT_RUN as error:
            if isinstance(error, UserError):
                raise
            reason = f"a small model cannot run the checks after {last!r} ({type(error).__name__}: {error})"
            raise _refused(small.model_type, " ".join(reason.split())) from error
    for name, difference in checks.items():
        bound, reason = IMAGE_BOUNDS[name]
        if not difference <= bound:
            raise _refused(
                small.model_type,
                f"a small model with random weights fails the check {name!r} with images: the difference is "
                f"{difference:.1e}, and at most {bound:.1e} is allowed, because {reason}",
            )
    return dataclasses.replace(layout, checks=tuple(checks.items()))


def _fill_zeros(file: Path) -> None:
    """Give matrices that start at zero (Gemma 3's projector) random values, so that images are felt."""
    tensors, generator = safetensors.torch.load_file(file), torch.Generator().manual_seed(0)
    for tensor in tensors.values():
        if tensor.dim() > 1 and not tensor.any():
            tensor.normal_(0, 0.05, generator=generator)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


def composite(
    small: Architecture, config: Mapping[str, Any], settings: Mapping[str, Any], place: str, folder: Path
) -> tuple[Any, ImageLayout, Samples, float]:
    """Save a composite with random weights in a folder.

    Return transformers' model of it, whose tower attends by SDPA; its layout without checks; samples; and the
    difference that SDPA makes.
    """
    save_random(small, config, place, folder, 1)
    _fill_zeros(folder / "model.safetensors")
    theirs = load_theirs(small, folder)
    layout = layout_of_images(theirs, small.decoder)
    merger, decoder = theirs.get_submodule(layout.merger), theirs.get_submodule(small.decoder)
    samples = Samples.of(merger, layout, image_processor(settings, folder, config))
    difference = _attention_difference(merger, decoder, samples)
    return theirs, with_masks(layout, merger, samples), samples, difference


def with_own_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a small model in which each special token has an id of its own."""
    ids: dict[str, int] = {}

    def numbered(part: Mapping[str, Any]) -> dict[str, Any]:
        result = dict(part)
        for name, value in part.items():
            if isinstance(value, Mapping):
                result[name] = numbered(value)
            elif type(value) is int and re.fullmatch(r"(?!(pad|bos|eos|decoder_start)_)\w+_token_(id|index)", name):
                result[name] = ids.setdefault(name.replace("_index", "_id"), _FIRST_SPECIAL + len(ids))
        return result

    return numbered(config)


def image_processor(settings: Mapping[str, Any], folder: Path, config: Mapping[str, Any]) -> Any:
    """Return transformers' image processor with these settings, for the model of `config`, written to `folder`."""
    from transformers import AutoImageProcessor

    (folder / PROCESSOR_FILE).write_text(json.dumps(settings))
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        raise UserError(f"data.images=true: {error}; pip install 'distlora[vision]'") from error
    merge = (config.get("vision_config") or {}).get("spatial_merge_size")
    if isinstance(getattr(processor, "merge_size", None), int) and isinstance(merge, int):
        processor.merge_size = merge
    return processor


class Samples(NamedTuple):
    """Three documents, of which the second has no image, and the tensors of the two images."""

    documents: tuple[Tensor, ...]
    """Their tokens, (1, T) int64 each."""
    images: tuple[tuple[ProcessedImage, ...], ...]
    """The images of each document."""
    token_id: int

    @classmethod
    def of(cls, merger: Any, layout: ImageLayout, processor: Any) -> Samples:
        """Make documents for the merger of transformers' small model."""
        draw, tensors = np.random.default_rng(0), []
        for size in ((64, 96, 3), (80, 48, 3)):
            made = processor(draw.integers(0, 255, size, np.uint8), return_tensors="pt")
            arrays = {n: v if isinstance(v, Tensor) else np.array(v) for n, v in made.items() if n in layout.names}
            tensors.append({name: torch.as_tensor(value) for name, value in arrays.items()})
        counts = [num_features(features_of(merger, [image])) for image in tensors]
        generator = torch.Generator().manual_seed(5)

        def text(length: int) -> Tensor:
            return torch.randint(*_TEXT_IDS, (1, length), generator=generator)

        places = [torch.full((1, count), layout.token_id) for count in counts]
        documents = (
            torch.cat([text(5), places[0], text(12)], dim=1),
            text(17),
            torch.cat([text(3), places[1], text(14)], dim=1),
        )
        return cls(documents, ((tensors[0],), (), (tensors[1],)), layout.token_id)

    @property
    def together(self) -> tuple[Tensor, Tensor, Tensor, tuple[ProcessedImage, ...]]:
        """Tokens, positions and labels (1, T) of the packed documents, and their images."""
        labels = torch.cat([self.labels(document) for document in self.documents], dim=1)
        positions = torch.cat([positions_of(document) for document in self.documents], dim=1)
        return torch.cat(self.documents, dim=1), positions, labels, sum(self.images, ())

    def labels(self, document: Tensor) -> Tensor:
        """Return the labels of a document, whose image tokens are not trained."""
        labels = next_tokens(document)
        return labels.masked_fill(labels == self.token_id, IGNORED_LABEL)

    def alone(self) -> Iterator[tuple[Tensor, Tensor, Tensor, tuple[ProcessedImage, ...]]]:
        """Yield the same as `together` for each document."""
        for document, images in zip(self.documents, self.images, strict=True):
            yield document, positions_of(document), self.labels(document), images


def _last_changed(features: Any) -> None:
    """Change the last feature of an image in place."""
    pooled = features.pooler_output
    last = pooled if isinstance(pooled, Tensor) else pooled[-1]
    last.view(-1, last.shape[-1])[-1] += 1.0


@torch.no_grad()
def _attention_difference(merger: nn.Module, decoder: nn.Module, samples: Samples) -> float:
    """Return the difference of features by SDPA and by eager attention, and leave SDPA chosen."""
    eager = features_of(merger, sum(samples.images, ())).pooler_output
    attend_fast(merger, decoder)
    fast = features_of(merger, sum(samples.images, ())).pooler_output
    both = (eager, fast) if isinstance(eager, Tensor) else (torch.cat(list(eager)), torch.cat(list(fast)))
    return relative_error(both[1], both[0])


@torch.no_grad()
def with_masks(layout: ImageLayout, merger: Any, samples: Samples) -> ImageLayout:
    """Return the layout with how features are seen, by running transformers' merger.

    Masks of packed documents are transformers' where those are right, as far as its outputs tell.
    """
    takes = inspect.signature(merger.forward).parameters

    def run(
        ids: Tensor, positions: Tensor, images: tuple[ProcessedImage, ...], change: Callable[[Any], None] | None = None
    ) -> Tensor:
        known: dict[str, Any] = {n: (ids == samples.token_id).long() for n in TOKEN_TYPES if n in takes}
        if images:
            features = features_of(merger, images)
            if change is not None:
                change(features)
            known["mm_encoder_outputs"] = {"image": features}
        return merger(input_ids=ids, position_ids=positions, use_cache=False, **known).last_hidden_state

    features = features_of(merger, samples.images[0])
    layout = dataclasses.replace(layout, deepstack=len(getattr(features, "deepstack_features", None) or ()))
    ids, positions, _, images = next(samples.alone())
    first = slice(5, 5 + num_features(features) - 1)
    before, after = run(ids, positions, images)[:, first], run(ids, positions, images, _last_changed)[:, first]
    if not (before - after).abs().max() > 1e-5 * before.abs().max():
        return layout
    alone = torch.cat([run(ids, positions, images) for ids, positions, _, images in samples.alone()], dim=1)
    ids, positions, _, images = samples.together
    is_right = relative_error(run(ids, positions, images), alone) <= BOUNDS["packed documents"][0]
    return dataclasses.replace(layout, ahead="transformers" if is_right else "ours")


def differences(
    small: Architecture, layout: ImageLayout, folder: Path, theirs: Any, samples: Samples
) -> Iterator[tuple[str, float]]:
    """Yield (name, difference) of the checks of a saved composite. `theirs`: transformers' model of it."""
    ours, _ = load_ours(small, folder, images=layout)
    own = {ours.hf_name(name): parameter for name, parameter in ours.named_parameters()}
    pairs = [(own[weight.path].detach(), theirs.get_parameter(weight.path).detach()) for weight in layout.tower]
    yield "tower", max(float((mine - other).abs().max()) for mine, other in pairs)
    with torch.no_grad():
        for name, weight in dense_weights(ours, adapted=False):
            theirs.get_parameter(name).copy_(weight)
        base = torch.full((1,), -1)
        found, expected, merger = [], [], theirs.get_submodule(layout.merger)
        for ids, positions, _, images in samples.alone():
            taken = Images.of([images], ids == samples.token_id, ids, positions, ours.merger, ids.device)
            found.append(ours.hidden_states(ids, positions, base, images=taken))
            expected.append(merger(**_inputs(merger, ids, images, samples.token_id)).last_hidden_state)
        hidden, of_theirs = torch.cat(found, dim=1), torch.cat(expected, dim=1)
        if small.has_experts or mixes_tokens(small):
            yield "forward of experts or mixers", relative_error(hidden, of_theirs)
        else:
            yield "forward", float((hidden - of_theirs).abs().max())
    yield from _gradient_checks(ours, theirs, samples)


def _inputs(model: Any, ids: Tensor, images: tuple[ProcessedImage, ...], token_id: int) -> dict[str, Any]:
    """Return the arguments of transformers' model, or its merger, for a document with at most one image."""
    takes = inspect.signature(model.forward).parameters
    types = {name: (ids == token_id).long() for name in TOKEN_TYPES if name in takes}
    return {"input_ids": ids, "use_cache": False, **types, **(images[0] if images else {})}


def losses_of(
    ours: CausalLM,
    ids: Tensor,
    positions: Tensor,
    labels: Tensor,
    images: tuple[ProcessedImage, ...],
    losses: LossForm = SUMS,
) -> Any:
    """Return the losses of one sequence in a form."""
    assert ours.image_layout is not None
    taken = Images.of([images], ids == ours.image_layout.token_id, ids, positions, ours.merger, ids.device)
    return ours(ids, positions, labels, images=taken, losses=losses)


def _gradient_checks(ours: CausalLM, theirs: Any, samples: Samples) -> Iterator[tuple[str, float]]:
    """Compare documents alone with transformers' model whose weights contain the adapters, and packed with alone."""
    parameters = adapter_parameters(ours)

    def alone() -> Tensor:
        return torch.stack([losses_of(ours, *document).sum() for document in samples.alone()]).sum()

    weights, losses = dict(dense_weights(ours, adapted=True)), []
    for ids, _, labels, images in samples.alone():
        inputs = _inputs(theirs, ids, images, samples.token_id)
        logits = functional_call(theirs, weights, kwargs=inputs).logits.float()
        losses.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
    of_theirs, one_by_one = torch.stack(losses).sum(), alone()
    gradients = gradients_of(one_by_one, parameters)
    yield "loss", relative_error(one_by_one, of_theirs)
    yield "gradients", largest_error(gradients, gradients_of(of_theirs, parameters))
    ids, positions, labels, images = samples.together
    packed = losses_of(ours, ids, positions, labels, images).sum()
    yield "packed loss", relative_error(packed, one_by_one)
    of_packed, expected = flat(gradients_of(packed, parameters)), flat(gradients)
    difference = relative_error(of_packed, expected)
    if difference > IMAGE_BOUNDS["packed gradients"][0]:
        difference /= packed_amplification(alone, parameters, expected)
    yield "packed gradients", difference
    for block in ours.blocks:
        block.checkpointing = True
    again = losses_of(ours, ids, positions, labels, images).sum()
    yield "recomputed gradients", relative_error(flat(gradients_of(again, parameters)), of_packed)
    with torch.no_grad():
        if ours.final_norm is not None:  # Objectives with a reference are refused otherwise.
            yield "reference", _reference_difference(ours, samples)
        document = next(samples.alone())
        other = losses_of(ours, *document[:3], tuple(_changed(samples.images[0][0])))
        yield "other pixels", -relative_error(other, losses_of(ours, *document))


def _reference_difference(ours: CausalLM, samples: Samples) -> float:
    """Return the largest difference of a token's loss by the reference pass from that of the base alone."""
    sequence, form = samples.together, LossForm(with_reference=True)
    _, reference = losses_of(ours, *sequence, form)
    before = {parameter: parameter.data for parameter in adapter_parameters(ours).values()}
    for parameter in before:
        parameter.data = torch.zeros_like(parameter)
    alone, _ = losses_of(ours, *sequence, form)
    for parameter, data in before.items():
        parameter.data = data
    return float((reference - alone).abs().max())


def _changed(image: ProcessedImage) -> Iterator[ProcessedImage]:
    """Yield the image with other pixels."""
    yield {name: tensor.flip(-1) if tensor.is_floating_point() else tensor for name, tensor in image.items()}
