"""Images in chats: records of all forms, tokens beside the processor's own, storage, and tensors made ahead."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image as PIL
import pytest
import torch
import yaml

pytest.importorskip("torchvision")

from distlora.architecture.tokens import load_tokenizer
from distlora.config import Config, DataConfig, ModelConfig, SourceConfig, TrainConfig, UserError
from distlora.config.checks import check_section
from distlora.config.file import as_mapping
from distlora.data.answers import to_answers
from distlora.data.encoding import Encoded, Encoder
from distlora.data.formats import ReadOptions, SourceRecord, to_document
from distlora.data.image_records import images_of
from distlora.data.images import ImageProcessor, ImageTensors, ImageText
from distlora.data.loader import StepLoader, joined
from distlora.data.preview import Paint, _row_lines, preview
from distlora.data.rows import IMAGE, TRAINED, PackedRows, content_digest, read_meta, split_file
from distlora.data.sources import find_source
from support.data_folders import prepare, write_lines
from support.image_models import FAMILIES, picture, write_image_model

SIZES = [(64, 96), (80, 48)]


def file_of(image, format="PNG"):
    """Return an encoded image."""
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def read(record, root=None, format="chat", **options):
    return to_document(SourceRecord("line 1", 0, record), format, True, ReadOptions(images=True, image_root=root))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_labels_are_the_processors(tmp_path, family):
    processor = write_image_model(tmp_path, family)
    tokenizer, data = processor.tokenizer, DataConfig(images=True)
    pictures = [picture(SIZES[number % 2], number) for number in range(3)]
    for number, image in enumerate(pictures):
        image.save(tmp_path / f"{number}.png")
    part = {"type": "image"}
    several = [
        {"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "It is red."},
        {"role": "user", "content": ["And ", part, " beside ", part, "\n?"]},
        {"role": "assistant", "content": "Green and blue."},
    ]
    single = [{"role": "user", "content": ["What is it?", part]}, {"role": "assistant", "content": "It is red."}]
    text = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "It is red."}]
    encoder = Encoder(tokenizer, "model", data, images=ImageText(ImageProcessor(tmp_path, data), tokenizer))
    for messages, count in ((several, 3), (single, 1), (text, 0)):
        document = read({"messages": messages, "images": [f"{i}.png" for i in range(count)]}, tmp_path)
        (ours,) = encoder.encode([document])
        parts = [
            message
            | {"content": [part if isinstance(part, dict) else {"type": "text", "text": part} for part in content]}
            for message in messages
            for content in [message["content"] if isinstance(message["content"], list) else [message["content"]]]
        ]
        rendered = processor.apply_chat_template(parts, tokenize=False)
        theirs = processor(text=[rendered], images=pictures[:count] or None, return_mm_token_type_ids=True)
        ids, is_image = list(theirs["input_ids"][0]), ours.trained & IMAGE != 0
        assert ours.tokens.tolist() == ids
        assert (is_image == (ours.tokens == json.loads((tmp_path / "config.json").read_text())["image_token_id"])).all()
        types = next((list(theirs[name][0]) for name in ("mm_token_type_ids", "token_type_ids") if name in theirs), [])
        framed = np.zeros(len(ids), bool)
        for span in ours.images:
            framed[span.start : span.end] = True
        typed = np.array(types) == 1 if types else is_image  # Some processors count the frame of an image as a part.
        assert (typed | ~is_image).all()
        assert (framed | ~typed).all()
        trained = tokenizer.decode(ours.tokens[ours.trained & TRAINED != 0].tolist())
        assert trained == "It is red.<|im_end|>" + "Green and blue.<|im_end|>" * (count == 3)
        assert [file_of(pictures[i]) for i in range(count)] == [Path(span.image).read_bytes() for span in ours.images]


PART = {"type": "text", "text": "What?"}
ANSWER = {"role": "assistant", "content": "Red."}


def asked(*content):
    return {"messages": [{"role": "user", "content": list(content)}, ANSWER]}


def data_url(content):
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


FORMS = [
    ("chat", asked({"type": "image", "image": "a.png"}, PART), "IW"),
    ("chat", asked({"type": "image", "path": "a.png"}, PART), "IW"),
    ("chat", asked(PART, {"type": "image_url", "image_url": {"url": "file://a.png"}}), "WI"),
    ("chat", asked({"type": "input_image", "image_url": "DATA"}, PART), "IW"),
    ("chat", asked({"type": "image", "base64": "BASE64"}, PART), "IW"),
    ("chat", asked({"type": "image"}, PART) | {"images": [{"bytes": "BYTES", "path": None}]}, "IW"),
    ("chat", asked("<image>What?") | {"image": {"bytes": None, "path": "a.png"}}, "IW"),
    ("chat", asked(PART) | {"images": ["a.png", "b.png"]}, "IIW"),
    ("sharegpt", {"image": "a.png", "conversations": [{"from": "human", "value": "What?<image>"}]}, "WI"),
    ("alpaca", {"instruction": "<image><image>What?", "output": "Red.", "images": ["a.png", "b.png"]}, "IIW"),
]


@pytest.mark.parametrize(("format", "record", "shape"), FORMS)
def test_images_of_every_form_become_parts(tmp_path, format, record, shape):
    content = file_of(picture((8, 8)))
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(content)
    texts = json.dumps(record).replace("DATA", data_url(content)).replace("BASE64", data_url(content)[22:])
    record = json.loads(texts, object_hook=lambda item: {k: content if v == "BYTES" else v for k, v in item.items()})
    parts = read(record, tmp_path, format).value["messages"][0]["content"]
    assert "".join("W" if part["type"] == "text" else "I" for part in parts) == shape
    images = [part["image"] for part in parts if part["type"] == "image"]
    assert all((Path(image).read_bytes() if isinstance(image, str) else image) == content for image in images)
    assert [part["text"] for part in parts if part["type"] == "text"] == ["What?"]


def test_both_answers_of_a_pair_have_the_images(tmp_path):
    (tmp_path / "a.png").write_bytes(file_of(picture((8, 8))))
    prompt = {"conversations": [{"from": "human", "value": "<image>What?"}]}
    answers = {"chosen": {"from": "gpt", "value": "Red."}, "rejected": {"from": "gpt", "value": "Blue."}}
    record = SourceRecord("line 1", 0, prompt | answers | {"images": ["a.png"]})
    reading = ReadOptions(images=True, image_root=tmp_path)
    pair = to_answers(record, "preference", True, reading).value
    assert [images_of(pair[side]["messages"]) for side in ("chosen", "rejected")] == [(str(tmp_path / "a.png"),)] * 2


REFUSED = [
    (asked({"type": "image", "image": "https://a/b.png"}), "lies on a server"),
    (asked({"type": "image", "image": "none.png"}), "there is no image"),
    (asked({"type": "image", "image": "data:image/png,abc"}), "not base64"),
    (asked("<image><image>") | {"images": ["a.png"]}, "2 places for images .* and 1 images"),
    (asked("<image>") | {"images": ["a.png", "a.png"]}, "1 places for images .* and 2 images"),
    (asked("<image> is a tag"), "1 places for images .* and 0 images"),
    ({"messages": [ANSWER | {"content": [{"type": "image", "image": "a.png"}]}]}, "the assistant's turn"),
    (asked({"type": "video", "video": "a.mp4"}), "of the type 'video'; only texts and images"),
    (asked(PART) | {"videos": ["a.mp4"]}, "'videos' holds media"),
    (asked(PART) | {"audio": "a.wav"}, "'audio' holds media"),
]


@pytest.mark.parametrize(("record", "reason"), REFUSED)
def test_records_that_cannot_be_read_are_refused_by_place(tmp_path, record, reason):
    (tmp_path / "a.png").write_bytes(file_of(picture((8, 8))))
    with pytest.raises(UserError, match=rf"^line 1.*{reason}"):
        read(record, tmp_path)
    with pytest.raises(UserError, match="the data set lies on the hub"):
        read(asked({"type": "image", "image": "a.png"}), None)
    with pytest.raises(UserError, match=r"images belong to chats"):
        read({"text": "a", "images": ["a.png"]}, tmp_path, "text")


def test_images_that_cannot_be_read_and_placeholders_in_texts_are_refused(qwen):
    _, encoder = qwen
    still = picture((64, 64))
    animated = io.BytesIO()
    still.save(animated, "GIF", save_all=True, append_images=[picture((64, 64), 1)])
    for content, reason in (
        (b"no image", "cannot be read"),
        (file_of(still)[:-20], "cut short"),
        (file_of(still, "JPEG")[:-500], "cut short"),
        (animated.getvalue(), "animated"),
    ):
        with pytest.raises(UserError, match=rf"^line 1: an image .*{reason}"):
            list(encoder.encode([read(asked({"type": "image", "image": data_url(content)}))]))
    with pytest.raises(UserError, match=r"has <\|image_pad\|> 1 times for 0 images"):
        list(encoder.encode([read(asked("<|image_pad|>"))]))
    with pytest.raises(UserError, match=r"the text holds <\|image_pad\|>, the token of images, where no image is"):
        list(encoder.encode([read({"text": "a <|image_pad|>"}, format="text")]))


def test_a_cut_keeps_whole_images(qwen):
    _, encoder = qwen
    image = {"type": "image", "image": data_url(file_of(picture((64, 96))))}
    (whole,) = encoder.encode([read(asked(image, PART, image))])
    first, second = whole.images
    cut = whole.cut(second.end - 1)
    assert (len(cut.tokens), cut.images) == (second.start, (first,))
    pair = Encoded.pair(whole, whole)
    assert pair.images[2].start == first.start + len(whole.tokens)
    both = pair.cut(2 * (second.end - 1))
    assert (len(both.tokens), both.rejected, len(both.images)) == (2 * second.start, second.start, 2)


def test_rotated_images_and_bounds_of_pixels(qwen):
    folder, _ = qwen
    image, exif = picture((640, 320)), PIL.Exif()
    exif[0x0112] = 6
    rotated = io.BytesIO()
    image.save(rotated, "JPEG", exif=exif)
    data = DataConfig(images=True, image_max_pixels=20_000, image_min_pixels=10_000)
    processor = ImageProcessor(folder, data)
    assert ImageText(processor, processor.processor.tokenizer).size(rotated.getvalue(), "") == (100, 200)
    assert processor.resized((10, 10)) == (100, 100)
    made = ImageTensors(folder, data, ["image_grid_thw"])(rotated.getvalue())
    _, height, width = made["image_grid_thw"][0].tolist()
    assert (height, width) == (12, 6)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Return (folder of a model, an encoder)."""
    from transformers import CONFIG_MAPPING

    from distlora.derive.shrink import shrink

    folder = tmp_path_factory.mktemp("qwen")
    config = shrink(CONFIG_MAPPING["qwen3_vl"]().to_dict())
    config["text_config"]["vocab_size"] = 512
    write_image_model(folder, "qwen3_vl", json.dumps({k: v for k, v in config.items() if not k.endswith("_token_id")}))
    data = DataConfig(images=True)
    processor = ImageProcessor(folder, data)
    tokenizer = processor.processor.tokenizer
    return folder, Encoder(tokenizer, "model", data, images=ImageText(processor, tokenizer))


@pytest.fixture(scope="module")
def prepared(qwen, tmp_path_factory):
    """Return (config, folder of the cache entry) of 12 chats with images, one of which is too long."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for number in range(12):
        picture((64 + 32 * (number % 3), 64), number).save(folder / f"{number}.png")
        names = [f"{number}.png", f"{(number + 1) % 12}.png"][: number % 3]
        records.append(asked(*["<image>"] * len(names), f"Which of {number}?") | {"images": names})
    picture((900, 900)).save(folder / "large.png")
    records.append(asked("<image>What?") | {"images": ["large.png"]})
    write_lines(folder / "chats.jsonl", records)
    data = DataConfig(
        path=str(folder / "chats.jsonl"), images=True, sequence_length=96, cache_dir=str(folder / "cache"),
        eval_fraction=0.0, train_on="all",
    )  # fmt: skip
    model, train = ModelConfig(path=str(qwen[0])), TrainConfig(global_batch=3)
    config = Config(run_dir=str(folder / "run"), model=model, data=data, train=train)
    return config, prepare(config)


def test_prepared_rows_hold_each_image_once_and_train_none_of_its_tokens(prepared):
    config, entry = prepared
    rows = PackedRows.open(entry, "train")
    counts = read_meta(entry)["splits"]["train"]
    assert (counts["images"], counts["truncated"], len(rows.images.table)) == (12, 1, 12)
    answers = read_meta(prepare(replace(config, data=replace(config.data, train_on="assistant"))))["splits"]["train"]
    assert (answers["images"], answers["dropped_long"], answers["dropped"]) == (12, 1, 0)
    stored = {rows.images.read(number) for number in range(12)}
    assert counts["image_bytes"] == sum(map(len, stored)) == rows.images.content.size
    is_image = rows.flags & IMAGE != 0
    assert counts["image_tokens"] == is_image.sum() > 0
    assert not (rows.flags[:, :-1][is_image[:, 1:]] & TRAINED).any()
    order = np.argsort(rows.images.table[:, 0], kind="stable")
    assert (order == np.arange(12)).all()
    taken = rows.take(np.array([len(rows) - 1, 0]))
    assert [taken.images.read(number) for number in taken.images.of(1)] == [
        rows.images.read(number) for number in rows.images.of(0)
    ]


def test_an_entry_is_found_again_until_an_image_or_a_bound_changes(prepared):
    config, entry = prepared
    assert prepare(config) == entry
    image = Path(config.data.path).parent / "0.png"
    os.utime(image, ns=(1, 1))
    assert prepare(config) != entry
    bounded = replace(config, data=replace(config.data, image_max_pixels=4096))
    assert prepare(bounded) not in (entry, prepare(config))
    # A resume compares this: what makes pixels counts, also where it changes no token.
    unbounded = replace(config, data=replace(config.data, image_max_pixels=10**8))
    assert read_meta(prepare(unbounded))["content"] != read_meta(prepare(config))["content"]


@pytest.mark.parametrize("world", [1, 3])
def test_every_layout_and_any_step_have_the_same_tensors(prepared, qwen, world):
    config, entry = prepared
    rows, names = PackedRows.open(entry, "train"), ("pixel_values", "image_grid_thw")
    make = ImageTensors(qwen[0], config.data, names)
    expected = {row: [make(rows.images.read(number)) for number in rows.images.of(row)] for row in range(len(rows))}
    for rank in range(world):
        loader = StepLoader(
            rows, global_batch=3, micro_batch=2, rank=rank, world=world, seed=0, shuffle=True, image_tensors=make
        )
        for step in (0, 1, 5):  # As a resume goes on at any step.
            batch = loader.batch(step)
            whole = joined(batch.micro_batches)
            assert whole.is_image.shape == whole.input_ids.shape
            for row, is_image, images in zip(whole.rows.tolist(), whole.is_image, whole.images, strict=True):
                made, wanted = list(images), expected.get(row, [])
                assert len(images) == len(made) == len(wanted)
                assert all(
                    torch.equal(one[name], two[name]) for one, two in zip(made, wanted, strict=True) for name in names
                )
                assert is_image.sum() == sum(int(one["image_grid_thw"].prod()) // 4 for one in made)
                assert len(list(images)) == len(made)  # A second time they are made again.


def replace_file(path, content):
    """Write a new file in its place: threads of other tests' loaders may still read the mapped one."""
    path.with_suffix(".new").write_bytes(content)
    os.replace(path.with_suffix(".new"), path)


def test_changed_images_and_readers_without_images_are_refused(prepared):
    _, entry = prepared
    layout = {"global_batch": 3, "micro_batch": 2, "rank": 0, "world": 1, "seed": 0, "shuffle": True}
    with pytest.raises(UserError, match="holds images, which only training reads"):
        StepLoader(PackedRows.open(entry, "train"), **layout)
    path = split_file(entry, "train", "images", ".bin")
    content, digest = path.read_bytes(), content_digest(entry, ["train"])
    replace_file(path, content[:100] + bytes([content[100] ^ 1]) + content[101:])
    try:
        assert content_digest(entry, ["train"]) != digest
        images = PackedRows.open(entry, "train").images
        with pytest.raises(UserError, match=r"an image of row .* has changed"):
            list(map(images.read, range(len(images.table))))
        replace_file(path, content[:-1])
        with pytest.raises(UserError, match="is absent or cut short"):
            PackedRows.open(entry, "train")
    finally:
        replace_file(path, content)


def test_parquet_and_saved_data_sets_hold_images(tmp_path, qwen):
    import datasets

    content = file_of(picture((64, 64)))
    messages = [{"role": "user", "content": "<image>What?"}, ANSWER]
    rows = {"messages": [messages], "images": [[{"bytes": content, "path": None}]]}
    made = datasets.Dataset.from_dict(rows).cast_column("images", datasets.List(datasets.Image()))
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "rows.parquet")
    for path in (tmp_path / "saved", tmp_path / "rows.parquet"):
        _, documents = find_source(SourceConfig(path=str(path)), images=True).open(has_template=True)
        assert [images_of(document.value["messages"]) for document in documents] == [(content,)]
    with pytest.raises(UserError, match="holds media"):
        find_source(SourceConfig(path=str(tmp_path / "saved"))).open(has_template=True)


def test_settings_without_effect_and_other_objectives_are_refused():
    data = {"path": "a.jsonl"}
    for changes, reason in (
        ({"image_max_pixels": 9}, "has no effect without data.images=true"),
        ({"images": True, "image_max_pixels": 4, "image_min_pixels": 9}, "is above data.image_max_pixels=4"),
        ({"images": True, "too_long": "split"}, "images belong to whole ones"),
    ):
        with pytest.raises(UserError, match=reason):
            check_section("data", DataConfig(**data, **changes))


def test_the_preview_shows_where_images_stand_and_the_page_shows_them(prepared, capsys, tmp_path):
    config, entry = prepared
    page = tmp_path / "page.html"
    assert preview(config.model, config.data, config.train, documents=13, html=str(page)) == 0
    lines = capsys.readouterr().out.splitlines()
    (first,) = (line for line in lines if "1.png, " in line and "11.png" not in line)
    assert first == (
        "    image at tokens 4 to 9 (6): 1.png, 96x64 pixels, read as 96x64: pixel_values 24x1536, "
        "image_grid_thw [[1, 4, 6]]"
    )
    (large,) = (line for line in lines if "large.png" in line)
    assert "cut off): large.png, 900x900 pixels" in large
    assert sum(line.count("<|image_pad|>") for line in lines) == 12  # One for each image.
    written = page.read_text()
    assert written.count('<img src="data:;base64,') == 12
    assert data_url((Path(config.data.path).parent / "1.png").read_bytes())[14:] in written
    assert "<mark>Which of 1?" in written
    rows = PackedRows.open(entry, "train")
    row = int(rows.images.table[0, 0])
    shown = _row_lines(rows, row, load_tokenizer(Path(config.model.path)), Paint(colour=False))
    assert "".join(shown).count("<|image_pad|>") == len(rows.images.of(row)) > 0


@pytest.mark.ci
def test_the_command_prepares_a_run_with_images(prepared):
    config, _ = prepared
    config = replace(config, data=replace(config.data, sequence_length=128))
    run = Path(config.run_dir)
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(as_mapping(config)))
    finished = subprocess.run(
        [sys.executable, "-m", "distlora.data.prepare", str(run)], capture_output=True, text=True, check=False
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    assert re.search(r"images +12, \d+ tokens, [\d.]+ MB encoded$", finished.stdout, re.MULTILINE)


def test_pairs_are_prepared_with_the_images_of_both_answers(prepared):
    config, _ = prepared
    folder = Path(config.data.path).parent
    answers = {"chosen": [ANSWER], "rejected": [ANSWER | {"content": "Blue."}]}
    pairs = [{"prompt": asked("<image>?")["messages"][:1], **answers, "images": [f"{n}.png"]} for n in (3, 4)]
    data = replace(config.data, path=str(write_lines(folder / "pairs.jsonl", pairs)), train_on="assistant")
    rows = PackedRows.open(prepare(replace(config, data=data, train=TrainConfig(objective="dpo"))), "train")
    images = [digest for *_, digest in rows.images.table.tolist()]
    assert images == [images[0]] * 2 + [images[2]] * 2 != [images[0]] * 4
    assert rows.pairs.sum() == 2
