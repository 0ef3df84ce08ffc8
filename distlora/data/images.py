"""Images of chats to tokens and tensors, by the model's own processor (transformers').

The processor replaces each placeholder in a text by as many tokens as the image has embeddings. That depends on the
image's size alone, so each size is processed once, on a blank image; pixels are made when a sequence is loaded. Both
are pure functions of the encoded image and the processor's files. Needs pillow and torchvision.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from distlora.architecture.config_checks import read_config
from distlora.architecture.images import LATER_PROCESSOR_FILE, PROCESSOR_FILE, TOKEN_NAMES, image_packages
from distlora.config import DataConfig, UserError
from distlora.data.rows import IMAGE, TRAINED
from distlora.data.turns import Conversation

if TYPE_CHECKING:
    from torch import Tensor

PROCESSOR_FILES = (PROCESSOR_FILE, LATER_PROCESSOR_FILE, "video_preprocessor_config.json")
"""Files in a model's folder that decide the tokens and the pixels of an image."""
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
"""Last bytes of whole files."""
_TAIL = 1 << 16
_ROTATED = (5, 6, 7, 8)
"""EXIF orientations whose width is the height as shown."""
_CHECKED = 2
"""Conversations whose tokens are compared with those of a call of the processor."""


class ImageSpan(NamedTuple):
    """The tokens of one image in a document."""

    start: int
    end: int
    """The token after the last, those of the frame that the processor writes around the image included."""
    image: str | bytes
    """Path or encoded bytes."""

    def moved(self, tokens: int) -> ImageSpan:
        """Return the same image that many tokens later."""
        return ImageSpan(self.start + tokens, self.end + tokens, self.image)


class _Placed(NamedTuple):
    """An image in a conversation's text."""

    image: str | bytes
    start: int
    end: int
    """Characters of what the processor writes for it, with each run of placeholders as one."""
    runs: tuple[int, ...]
    """Lengths of these runs."""


def image_settings(data: DataConfig) -> dict[str, Any]:
    """Return what decides tokens and pixels beside the processor's files. Raises UserError for a missing package."""
    return {"max_pixels": data.image_max_pixels, "min_pixels": data.image_min_pixels, **image_packages()}


class ImageProcessor:
    """The processor of a model's folder, for one image at a time."""

    def __init__(self, model_dir: Path, data: DataConfig) -> None:
        """Load the processor. Raises UserError where there is none that writes tokens for images."""
        image_settings(data)
        import torch  # noqa: F401  (transformers looks for it when it is imported)
        import transformers

        self.model_dir, self._data = model_dir, data
        config = read_config(model_dir)
        if config.get("model_type") == "paligemma":
            raise UserError(
                f"data.images=true: {model_dir} is a PaliGemma, whose prompt attends to itself in both directions and "
                "which has no chats; that is not supported. Use a model of images that chats"
            )
        try:
            self.processor: Any = transformers.AutoProcessor.from_pretrained(
                model_dir, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # As for tokenizers: a damaged file shows as whatever its reader trips over.
            reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
            raise UserError(
                f"data.images=true: {model_dir} holds no processor that can be loaded: {reason}; download the model's "
                f"{', '.join(PROCESSOR_FILES[:2])}, or leave data.images out"
            ) from error
        self.placeholder: str | None = getattr(self.processor, "image_token", None)
        """Text that the chat template writes for an image."""
        token = next((config[name] for name in TOKEN_NAMES if isinstance(config.get(name), int)), None)
        if token is None or self.placeholder is None or not hasattr(self.processor, "image_processor"):
            raise UserError(
                f"data.images=true: the processor in {model_dir} ({type(self.processor).__name__}) and its config.json "
                "name no token for images; use a model that takes images in chats, or leave data.images out"
            )
        self.token: int = token
        """The token that is replaced by an embedding of the image."""
        settings = self.processor._merge_kwargs(tokenizer_init_kwargs=self.processor.tokenizer.init_kwargs)
        self._settings = settings["images_kwargs"] | {"return_tensors": "pt"}

    def __call__(self, image: Any, **changes: Any) -> tuple[Any, str]:
        """Return (tensors, text in the place of the placeholder) of a PIL image."""
        layout, *_ = self.processor.prepare_inputs_layout(images=[image], text=[self.placeholder])
        made, (text,) = self.processor._process_images(layout, **(self._settings | changes))
        return made, text

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return (width, height) of an image within data.image_max_pixels and image_min_pixels, of the same shape."""
        pixels, most, fewest = size[0] * size[1], self._data.image_max_pixels, self._data.image_min_pixels
        bound = most if 0 < most < pixels else fewest if pixels < fewest else pixels
        if bound == pixels:
            return size
        scale = (bound / pixels) ** 0.5
        return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


class ImageTensors:
    """Tensors of images for a model."""

    def __init__(self, model_dir: Path, data: DataConfig, names: Sequence[str]) -> None:
        """`names`: those of the tensors that the model takes."""
        self.processor, self._names = ImageProcessor(model_dir, data), tuple(names)

    def __call__(self, image: bytes) -> dict[str, Tensor]:
        """Return the tensors of an encoded image, on the CPU: a pure function, from any thread."""
        from PIL import ImageOps

        with open_image(image, "an image of the prepared data") as opened:
            pixels = ImageOps.exif_transpose(opened).convert("RGB")
        if (size := self.processor.resized(pixels.size)) != pixels.size:
            pixels = pixels.resize(size)
        made, _ = self.processor(pixels)
        return {name: made[name] for name in self._names if name in made}


@contextlib.contextmanager
def open_image(image: str | bytes, place: str) -> Iterator[Any]:
    """Open an image with PIL. Raises UserError for one that cannot be read, is cut short or is animated."""
    from PIL import Image

    name = f"the image {image}" if isinstance(image, str) else "an image"
    try:
        with open(image, "rb") if isinstance(image, str) else io.BytesIO(image) as file, Image.open(file) as opened:
            if end := _ENDS.get(str(opened.format)):
                file.seek(max(0, file.seek(0, io.SEEK_END) - _TAIL))
                if end not in file.read():
                    raise OSError("the file is cut short")
            if getattr(opened, "is_animated", False) and opened.format != "MPO":  # Cameras' files hold a preview.
                raise UserError(f"{place}: {name} is animated; only still images are supported; save one of its frames")
            yield opened
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{place}: {name} cannot be read ({error}); replace it, or leave the record out") from error


class ImageText:
    """Tokens of the images in chats, as the model's processor writes them."""

    def __init__(self, processor: ImageProcessor, tokenizer: Any) -> None:
        """Raise UserError for a tokenizer that does not say where in a text its tokens lie."""
        if not tokenizer.is_fast:
            raise UserError(
                f"data.images=true: the tokenizer in {processor.model_dir} is a slow one of transformers, which does "
                "not say where the tokens of an image lie; add a tokenizer.json to the folder"
            )
        self._processor, self._tokenizer = processor, tokenizer
        processor.processor.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.get(processor.token)
        self._run = None
        """Runs of the image's token. One token of each is enough where none merges with what is around it."""
        if added is not None and not (added.normalized or added.single_word or added.lstrip or added.rstrip):
            self._run = re.compile(f"(?:{re.escape(added.content)})+")
        self._texts: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}
        self._checked = 0

    def expand(self, conversation: Conversation) -> tuple[Conversation, list[_Placed]]:
        """Return the conversation with the processor's text for each image, runs of its token as one; and the images.

        Raises UserError for another number of placeholders than images.
        """
        token = str(self._processor.placeholder)
        before = conversation.text.split(token)
        if len(before) - 1 != len(conversation.images):
            raise UserError(
                f"{conversation.place}: the text of the chat has {token} {len(before) - 1} times for "
                f"{len(conversation.images)} images; remove it from the messages' texts, or set data.template to a "
                "template that writes it once for each image"
            )
        pieces, placed, old, new = [before[0]], list[_Placed](), [0], [0]
        start = end = len(before[0])
        for text, image in zip(before[1:], conversation.images, strict=True):
            written, runs = self._text_of(self.size(image, conversation.place))
            placed.append(_Placed(image, start, start + len(written), runs))
            old.append(end + len(token))
            new.append(start + len(written))
            pieces += [written, text]
            start += len(written) + len(text)
            end += len(token) + len(text)

        def moved(character: int) -> int:
            number = bisect.bisect_right(old, character) - 1
            return character + new[number] - old[number]

        turns = tuple(turn._replace(start=moved(turn.start), end=moved(turn.end)) for turn in conversation.turns)
        return conversation._replace(text="".join(pieces), turns=turns), placed

    def size(self, image: str | bytes, place: str) -> tuple[int, int]:
        """Return (width, height) of an image, as it is shown and within the bounds of its pixels."""
        with open_image(image, place) as opened:
            size = opened.size[::-1] if opened.getexif().get(0x0112) in _ROTATED else opened.size
        return self._processor.resized(size)

    def describe(self, image: str | bytes, place: str) -> str:
        """Return an image's name and size, and the shapes and small tensors that the processor makes of it."""
        from PIL import Image

        with open_image(image, place) as opened:
            written = "x".join(map(str, opened.size))
        size = self.size(image, place)
        made, _ = self._processor(Image.new("RGB", size))
        tensors = [
            f"{name} {'x'.join(map(str, tensor.shape)) if tensor.numel() > 6 else tensor.tolist()}"
            for name, tensor in made.items()
            if hasattr(tensor, "shape")
        ]
        name = Path(image).name if isinstance(image, str) else f"{len(image):,} bytes"
        return f"{name}, {written} pixels, read as {size[0]}x{size[1]}: {', '.join(tensors)}"

    def _text_of(self, size: tuple[int, int]) -> tuple[str, tuple[int, ...]]:
        if size not in self._texts:
            from PIL import Image

            try:  # Pixels decide nothing, and the nearest ones are the fastest to resize.
                _, text = self._processor(Image.new("RGB", size), resample=Image.Resampling.NEAREST)
            except Exception as error:  # The processor's own code, with a size that it may not take.
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                raise UserError(
                    f"the processor in {self._processor.model_dir} refuses an image of {size[0]}x{size[1]} pixels "
                    f"({reason}); leave such images out, or set data.image_min_pixels and data.image_max_pixels"
                ) from error
            runs: list[int] = []
            if self._run is not None:
                width = len(self._tokenizer.added_tokens_decoder[self._processor.token].content)
                runs = [len(run) // width for run in self._run.findall(text)]
                text = self._run.sub(lambda run: run[0][:width], text)
            self._texts[size] = text, tuple(runs)
        return self._texts[size]

    def spread(
        self, tokens: np.ndarray, trained: np.ndarray, placed: Sequence[_Placed], encoding: Any
    ) -> tuple[np.ndarray, np.ndarray, tuple[ImageSpan, ...]]:
        """Return (tokens, trained, spans) with every token of each image, none of which is trained.

        `tokens` and `trained` (T,) are those of the text that `expand` returned, `encoding` says where in it they lie.
        """
        trained, repeats = trained.copy(), np.ones(len(tokens), np.int64)
        is_image = np.zeros(len(tokens), bool)
        bounds = [(encoding.char_to_token(each.start), encoding.char_to_token(each.end - 1) + 1) for each in placed]
        for start, end in bounds:
            trained[start:end] &= ~np.uint8(TRAINED)
            is_image[start:end] = tokens[start:end] == self._processor.token
        if self._run is not None:
            repeats[is_image] = [length for each in placed for length in each.runs]
        ends = np.cumsum(repeats)
        spans = tuple(
            ImageSpan(int(ends[start] - repeats[start]), int(ends[end - 1]), each.image)
            for (start, end), each in zip(bounds, placed, strict=True)
        )
        trained[is_image] |= IMAGE
        return np.repeat(tokens, repeats), np.repeat(trained, repeats), spans

    def check_places(self, place: str, tokens: np.ndarray, flags: np.ndarray) -> None:
        """Raise UserError for a document with the image's token where no image is."""
        if bool(((tokens == self._processor.token) & (flags & IMAGE == 0)).any()):
            written = self._tokenizer.convert_ids_to_tokens(self._processor.token)
            raise UserError(
                f"{place}: the text holds {written}, the token of images, where no image is; remove it from the text"
            )

    def check(self, conversation: Conversation, tokens: np.ndarray) -> None:
        """Compare the first conversations' tokens with a call of the processor. Raises UserError where they differ."""
        if self._checked >= _CHECKED:
            return
        self._checked += 1
        from PIL import Image

        images = [Image.new("RGB", self.size(image, conversation.place)) for image in conversation.images]
        made = self._processor.processor(text=[conversation.text], images=images, add_special_tokens=False)
        if list(made["input_ids"][0]) != tokens.tolist():
            raise UserError(
                f"{conversation.place}: the processor in {self._processor.model_dir} "
                f"({type(self._processor.processor).__name__}) writes other tokens for this chat than were derived "
                "from its parts, so its images are not supported; leave data.images out"
            )
