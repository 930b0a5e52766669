"""SAM, SAM 2 and HQ-SAM as teachers: tiny ones of random weights, against transformers' own way from a box to a
mask.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import re
import shutil

import numpy as np
import pytest

from mqformer_jax.input.record import DatasetInfo, Record
from mqformer_jax.synthesize.teachers import MASK_TEACHERS, Picture, make_teacher

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.4")
pytestmark = pytest.mark.parity

FAMILIES = ("sam", "hq-sam", "sam2")
SIDE = 64  # of the canvas
SIZES = ((50, 90), (120, 70), (64, 64), (3, 40))  # height, width; the last is not to be taken for three channels
COUNTS = (3, 1, 4, 2)  # boxes in each
BOX_PROMPTS = dict(hidden_size=32, image_size=SIDE)
DECODER = dict(hidden_size=32, mlp_dim=64, num_attention_heads=2, iou_head_hidden_dim=32)
VIT = dict(hidden_size=32, output_channels=32, num_hidden_layers=2, num_attention_heads=2, num_pos_feats=16)
VIT |= dict(image_size=SIDE, patch_size=8, window_size=3, global_attn_indexes=[1])
HIERA = dict(model_type="sam2_hiera_det_model", hidden_size=8, image_size=[SIDE, SIDE], blocks_per_stage=[1, 1, 2, 1])
HIERA |= dict(
    embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 2, 4], window_size_per_stage=[4, 2, 2, 2]
)
HIERA |= dict(global_attention_blocks=[3], window_positional_embedding_background_size=[4, 4])
NECK = dict(
    backbone_channel_list=[64, 32, 16, 8], backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]], fpn_hidden_size=32
)
MEMORY = dict(memory_attention_num_layers=1, memory_attention_feed_forward_hidden_size=32, image_size=SIDE)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def build(kind: str):
    """A model whose masks depend on the image and on the box, as those of transformers' own first weights do not."""
    parts = dict(prompt_encoder_config=BOX_PROMPTS | dict(patch_size=8), mask_decoder_config=DECODER, vision_config=VIT)
    parts2 = dict(
        prompt_encoder_config=BOX_PROMPTS, mask_decoder_config=DECODER, vision_config=NECK | dict(backbone_config=HIERA)
    )
    if kind == "sam":
        model = transformers.SamModel(transformers.SamConfig(**parts))
    elif kind == "hq-sam":
        parts["mask_decoder_config"] = DECODER | dict(vit_dim=32)
        model = transformers.SamHQModel(transformers.SamHQConfig(**parts))
    elif kind == "sam2":
        model = transformers.Sam2Model(transformers.Sam2Config(**parts2))
    else:
        model = transformers.Sam2VideoModel(transformers.Sam2VideoConfig(**parts2, **MEMORY))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            spread = 1 / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.2
            weight.copy_(
                torch.normal(0 if weight.ndim > 1 else weight, torch.full_like(weight, spread), generator=draw)
            )
        if not kind.startswith("sam2"):  # whose scores need not lie between 0 and 1, but shall here
            model.mask_decoder.iou_prediction_head.proj_out.bias += 1
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other take longer than models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Each family's weights and settings as they are published."""
    root = tmp_path_factory.mktemp("published")
    for kind in (*FAMILIES, "sam2-video"):
        build(kind).save_pretrained(root / kind)
        if kind.startswith("sam2"):
            settings = dict(image_processor_type="Sam2ImageProcessor", size=dict(height=SIDE, width=SIDE))
        else:
            settings = dict(
                image_processor_type="SamImageProcessor",
                size=dict(longest_edge=SIDE),
                pad_size=dict(height=SIDE, width=SIDE),
            )
        (root / kind / "preprocessor_config.json").write_text(json.dumps(settings))
    return {folder.name: str(folder) for folder in root.iterdir()}


@pytest.fixture(scope="module")
def teachers(folders):
    return {family: make_teacher(f"{family}:{folders[family]}", MASK_TEACHERS) for family in FAMILIES}


def asked(sizes=SIZES, counts=COUNTS) -> tuple[list[Picture], list[np.ndarray]]:
    rng, pictures, boxes = np.random.default_rng(0), [], []
    for (h, w), count in zip(sizes, counts):
        corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), 1) * (w, h)
        boxes.append(corners.reshape(count, 4).astype(np.float32))
        record = Record("a", b"", h, w)
        image = rng.integers(0, 256, (h, w, 3), np.uint8)
        pictures.append(Picture(record, DatasetInfo("toy", (), {}), image, tuple(range(count)), boxes[-1]))
    return pictures, boxes


def logits_of(drawn) -> np.ndarray:
    return drawn.masks[np.arange(len(drawn.scores))]


def same(ours, theirs, tolerance: float = 1e-4) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(logits_of(a), logits_of(b), atol=tolerance)
        np.testing.assert_allclose(a.scores, b.scores, atol=tolerance)


@torch.no_grad()
def theirs(family: str, folder: str, image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mask logits [k, h, w] and predicted IoU [k] in the way of transformers' documentation, whole."""
    kinds = {
        "sam": ("SamModel", "SamProcessor"),
        "hq-sam": ("SamHQModel", "SamHQProcessor"),
        "sam2": ("Sam2Model", "Sam2Processor"),
    }
    model, processor = (getattr(transformers, name) for name in kinds[family])
    model = model.from_pretrained(folder).eval()
    size = image.shape[:2]
    if family == "sam2":  # its image processor needs torchvision: what it does, by hand
        from PIL import Image

        square = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) / 255
        pixels = torch.tensor((square - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)[None]
        prompts = torch.tensor(boxes * SIDE / np.array(size[::-1] * 2))[None]
        said = model(pixel_values=pixels, input_boxes=prompts, multimask_output=False)
        masks = torch.nn.functional.interpolate(said.pred_masks[0], size, mode="bilinear", align_corners=False)
    else:
        processor = processor(transformers.SamImageProcessorPil.from_pretrained(folder))
        given = processor(
            images=image, input_boxes=[boxes.tolist()], return_tensors="pt", input_data_format="channels_last"
        )
        sizes = given.pop("original_sizes"), given.pop("reshaped_input_sizes")
        said = model(**given, multimask_output=False)
        (masks,) = processor.post_process_masks(said.pred_masks, *sizes, binarize=False)
    return masks[:, 0].numpy(), said.iou_scores[0, :, 0].numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_and_scores_match_transformers_for_any_image_shape(family, folders, teachers):
    pictures, boxes = asked()
    for picture, own, drawn in zip(pictures, boxes, teachers[family](pictures, boxes), strict=True):
        masks, scores = theirs(family, folders[family], picture.image, own)
        assert drawn.masks.shape == (len(own), *picture.image.shape[:2]) == masks.shape
        assert (
            masks.std() > 0.05
            and (len(own) == 1 or np.ptp(masks, 0).max() > 0.1)
            and 0 < scores.min()
            and scores.max() < 1
        )
        np.testing.assert_allclose(logits_of(drawn), masks, atol=1e-4)
        np.testing.assert_allclose(drawn.scores, scores, atol=1e-6)


def test_sam2_pixels_match_its_own_image_processor(folders, teachers):
    pytest.importorskip("torchvision")
    original = transformers.Sam2ImageProcessor.from_pretrained(folders["sam2"])
    for picture in asked()[0]:
        pixels = [
            each(picture.image, input_data_format="channels_last", return_tensors="pt").pixel_values
            for each in (original, teachers["sam2"].image_processor)
        ]
        np.testing.assert_allclose(*pixels, atol=1.01 / 255 / min(STD))  # to a step of 8 bits


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_sizes_do_not_change_masks_or_scores(family, teachers, monkeypatch):
    pictures, boxes = asked()
    before, seen = teachers[family](pictures, boxes), dict(images=[], boxes=[])
    monkeypatch.setattr("mqformer_jax.synthesize.sam.PICTURES", 3)
    monkeypatch.setattr("mqformer_jax.synthesize.sam.BOXES", 2)
    model = teachers[family].model
    hooks = [
        model.vision_encoder.register_forward_pre_hook(
            lambda _, args, kwargs: seen["images"].append(len(args[0] if args else kwargs["pixel_values"])),
            with_kwargs=True,
        ),
        model.prompt_encoder.register_forward_pre_hook(
            lambda _, args, kwargs: seen["boxes"].append(kwargs["input_boxes"].shape[1]), with_kwargs=True
        ),
    ]
    after = teachers[family](pictures, boxes)
    for hook in hooks:
        hook.remove()
    same(after, before)
    assert seen == dict(images=[3, 1], boxes=[2, 1, 1, 2, 2, 2])


@pytest.mark.parametrize("family", FAMILIES)
def test_image_without_boxes_gets_no_masks_and_does_not_affect_others(family, teachers):
    pictures, boxes = asked()
    some = teachers[family](pictures, [boxes[0], np.zeros((0, 4), np.float32), *boxes[2:]])
    assert logits_of(some[1]).shape == (0, *SIZES[1]) and some[1].scores.shape == (0,)
    whole = teachers[family](pictures, boxes)
    same([some[0], *some[2:]], [whole[0], *whole[2:]])
    assert teachers[family]([], []) == []


@pytest.mark.parametrize("shift, expected", [(-9, 0), (9, 1)])
def test_predicted_scores_are_clipped_to_0_and_1(folders, shift, expected):
    teacher = make_teacher(f"sam:{folders['sam']}", MASK_TEACHERS)
    with torch.no_grad():
        teacher.model.mask_decoder.iou_prediction_head.proj_out.bias += shift
    assert all((drawn.scores == expected).all() for drawn in teacher(*asked()))


def test_sam2_image_model_loads_published_video_weights(folders, tmp_path):
    still, video = build("sam2"), transformers.Sam2VideoModel.from_pretrained(folders["sam2-video"])
    assert not still.load_state_dict(video.state_dict(), strict=False).missing_keys
    still.save_pretrained(tmp_path)
    shutil.copy(f"{folders['sam2']}/preprocessor_config.json", tmp_path)
    same(*(make_teacher(f"sam2:{folder}", MASK_TEACHERS)(*asked()) for folder in (folders["sam2-video"], tmp_path)))


def test_half_precision_weights_are_loaded_as_float32(folders, tmp_path):
    shutil.copytree(folders["sam"], tmp_path / "half")
    transformers.SamModel.from_pretrained(folders["sam"]).half().save_pretrained(tmp_path / "half")
    teacher = make_teacher(f"sam:{tmp_path / 'half'}", MASK_TEACHERS)
    assert {weight.dtype for weight in teacher.model.parameters()} == {torch.float32}


def test_teacher_name_identifies_weights_and_transformers_version(folders, teachers, tmp_path):
    for family in FAMILIES:
        assert re.fullmatch(
            rf"{family}:{family} [0-9a-f]{{8}} \(transformers {transformers.__version__}\)", teachers[family].name
        )
    tuned, moved = tmp_path / "tuned" / "sam", tmp_path / "moved" / "sam"
    shutil.copytree(folders["sam"], moved)
    shutil.copytree(folders["sam"], tuned)
    weights = bytearray((tuned / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # a bit of the last weight
    (tuned / "model.safetensors").write_bytes(weights)
    names = [make_teacher(f"sam:{folder}", MASK_TEACHERS).name for folder in (tuned, moved, f"{moved}/")]
    assert names[1:] == [teachers["sam"].name] * 2 != names[:1] * 2


def test_teacher_name_of_a_hub_model_includes_the_weights_hash(folders, teachers, monkeypatch):
    monkeypatch.setattr("mqformer_jax.synthesize.hugging_face.snapshot_download", lambda name, **_: folders["sam2"])
    teacher = make_teacher("sam2:someone/sam2-tiny", MASK_TEACHERS)
    assert teacher.name == teachers["sam2"].name.replace("sam2:sam2", "sam2:someone/sam2-tiny")


def cut(folder: pathlib.Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def pickled(folder: pathlib.Path) -> None:
    os.remove(folder / "model.safetensors")
    torch.save(build("sam").state_dict(), folder / "pytorch_model.bin")


def incomplete(folder: pathlib.Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["mask_decoder.iou_token.weight"]
    save_file(weights, folder / "model.safetensors", metadata=dict(format="pt"))


def wider(folder: pathlib.Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["mask_decoder_config"]["mlp_dim"] = 48
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "harm, words",
    [
        (shutil.rmtree, "there is no such folder, and this is not a name"),
        (lambda folder: os.remove(folder / "config.json"), "No such file.*config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "Expecting property name"),
        (lambda folder: (folder / "config.json").write_text("[]"), "list indices"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "clip"}'),
            "its config.json describes another model",
        ),
        (lambda folder: os.remove(folder / "preprocessor_config.json"), "Can't load image processor"),
        (lambda folder: os.remove(folder / "model.safetensors"), "no file named model.safetensors"),
        (pickled, "no file named model.safetensors"),
        (cut, "incomplete metadata"),
        (incomplete, "mask_decoder.iou_token.weight is missing"),
        (wider, "mask_decoder.* has an unexpected shape"),
    ],
)
def test_unreadable_weights_folder_is_a_one_line_error(folders, tmp_path, monkeypatch, harm, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "sam"
    shutil.copytree(folders["sam"], folder)
    harm(folder)
    with pytest.raises(ValueError, match=f"^sam:{folder}.*({words})") as error:
        make_teacher(f"sam:{folder}", MASK_TEACHERS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "asked_as, holds", [("sam", "sam2"), ("sam2", "sam"), ("sam", "hq-sam"), ("hq-sam", "sam"), ("sam", "sam2-video")]
)
def test_weights_of_another_family_are_rejected_with_the_right_teacher(folders, asked_as, holds):
    with pytest.raises(ValueError, match=f"use {holds.removesuffix('-video')}:{folders[holds]}.$") as error:
        make_teacher(f"{asked_as}:{folders[holds]}", MASK_TEACHERS)
    assert "\n" not in str(error.value)


def test_failed_hub_download_is_a_one_line_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError,
        match="^sam2:someone/nothing: there is no such folder, and the download from the Hugging Face hub failed",
    ) as error:
        make_teacher("sam2:someone/nothing", MASK_TEACHERS)
    assert "\n" not in str(error.value)


def test_loading_and_predicting_print_and_log_nothing(folders, capfd):
    heard: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: heard.append(record.getMessage())
    transformers.logging.add_handler(listener)
    for family, folder in (*((family, folders[family]) for family in FAMILIES), ("sam2", folders["sam2-video"])):
        make_teacher(f"{family}:{folder}", MASK_TEACHERS)(*asked())
    transformers.logging.remove_handler(listener)
    assert capfd.readouterr() == ("", "") and heard == []
