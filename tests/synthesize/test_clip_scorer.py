"""CLIP's cosines of captions and boxes, against CLIPModel's own of one crop and one text at a time. The weights are
random and tiny.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

from PIL import Image  # noqa: E402

from mqformer_jax.input.record import DatasetInfo, Record  # noqa: E402
from mqformer_jax.synthesize import clip_scorer  # noqa: E402
from mqformer_jax.synthesize.clip_scorer import ClipScorer  # noqa: E402
from mqformer_jax.synthesize.teachers import CAPTION_SCORERS, Picture, make_teacher  # noqa: E402

SIDE, CONTEXT = 32, 12
RECORD, INFO = Record("unread", b"", 60, 90), DatasetInfo("unread", (), {})
LONG = "the small ox and one ear"  # a letter is a token here, and two are the start and the end


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small to share out
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny CLIP, as save_pretrained leaves it. Its tokenizer knows letters, and has no merges."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [f"{letter}{end}" for end in ("", "</w>") for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {piece: i for i, piece in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    text = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
    )
    text |= dict(
        vocab_size=len(vocabulary),
        bos_token_id=len(letters),
        eos_token_id=len(letters) + 1,
        pad_token_id=len(letters) + 1,
    )
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    for parameter in model.parameters():
        if parameter.ndim > 1:  # or all pictures look the same to it
            torch.nn.init.normal_(parameter, std=0.3)
    images = transformers.CLIPImageProcessor(size=dict(shortest_edge=SIDE), crop_size=dict(height=SIDE, width=SIDE))
    model.save_pretrained(folder)
    transformers.CLIPProcessor(images, transformers.CLIPTokenizer(vocab=vocabulary, merges=[])).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def scorer(folder) -> ClipScorer:
    return ClipScorer(folder)


def picture(boxes: list[list[float]], seed: int = 0) -> Picture:
    image = np.random.default_rng(seed).integers(0, 256, (60, 90, 3), np.uint8)
    return Picture(RECORD, INFO, image, tuple(range(len(boxes))), np.array(boxes, np.float64).reshape(-1, 4))


PICTURES = [
    picture([[10, 10, 30, 30], [5, 20, 85, 40], [70.5, 0, 90, 60], [50, 20, 60, 21]]),
    picture([]),
    picture([[0, 0, 90, 60]], seed=1),
]
CAPTIONS = [[["a dog", "a cat", "a dog"], [], [LONG], []], [], [["a dog", "bus"]]]


@pytest.fixture(scope="module")
def original(folder) -> tuple:
    return transformers.CLIPModel.from_pretrained(folder), transformers.CLIPProcessor.from_pretrained(folder)


def plain(original: tuple, pixels: np.ndarray, text: str) -> float:
    """The cosine as transformers' own example has it, of an image that is square already and a text that fits."""
    model, processor = original
    square = Image.fromarray(pixels).resize((SIDE, SIDE), Image.BICUBIC)
    inputs = processor(text=[text], images=square, return_tensors="pt", padding=True)
    with torch.no_grad():
        return (model(**inputs).logits_per_image / model.logit_scale.exp()).item()


def test_cosines_match_clip_for_single_crops_and_texts(scorer, original):
    first, empty, last = scorer(PICTURES, CAPTIONS)
    assert (
        [said.shape for said in first] == [(3, 4), (0, 4), (1, 4), (0, 4)]
        and empty == []
        and [said.shape for said in last] == [(2, 1)]
    )
    # a tenth more on each side
    crops = [
        (slice(8, 32), slice(8, 32)),
        (slice(18, 42), slice(0, 90)),
        (slice(0, 60), slice(68, 90)),
        (slice(19, 22), slice(49, 61)),
    ]
    want = np.array([[plain(original, PICTURES[0].image[crop], text) for crop in crops] for text in CAPTIONS[0][0]])
    np.testing.assert_allclose(first[0], want, atol=1e-5)
    assert np.ptp(want, axis=0).min() > 0.01 and np.ptp(want, axis=1).min() > 0.01  # each text and each crop is another
    np.testing.assert_allclose(
        last[0][:, 0], [plain(original, PICTURES[2].image, text) for text in ("a dog", "bus")], atol=1e-5
    )


def test_long_caption_is_truncated_to_the_context_length(scorer):
    long, cut, other = (scorer(PICTURES[2:], [[[text]]])[0][0] for text in (LONG, "the small ox", "the small o"))
    np.testing.assert_allclose(long, cut, atol=1e-6)
    assert abs(cut - other).max() > 1e-3


def test_chunk_size_does_not_change_the_scores(scorer, monkeypatch):
    want = scorer(PICTURES, CAPTIONS)
    for chunk in (1, 2):
        monkeypatch.setattr(clip_scorer, "CHUNK", chunk)
        for some, others in zip(scorer(PICTURES, CAPTIONS), want):
            for one, other in zip(some, others):
                np.testing.assert_allclose(one, other, atol=1e-6)


def test_each_box_and_each_text_is_encoded_once(scorer, monkeypatch):
    seen = {"_words": 0, "_crops": 0}
    for kind in seen:
        encode = getattr(scorer, kind)
        monkeypatch.setattr(
            scorer,
            kind,
            lambda items, kind=kind, encode=encode: seen.update({kind: seen[kind] + len(items)}) or encode(items),
        )
    scorer(PICTURES, CAPTIONS)
    assert seen == {"_words": 4, "_crops": 5}


def test_empty_inputs_give_empty_scores(scorer):
    assert scorer([], []) == [] and scorer([picture([])], [[]]) == [[]]
    assert [said.shape for said in scorer([picture([[0, 0, 9, 9]])], [[[]]])[0]] == [(0, 1)]


def test_scorer_is_made_by_name_and_its_name_includes_the_version(folder, scorer):
    assert make_teacher(f"clip:{folder}", CAPTION_SCORERS).name == scorer.name
    assert re.fullmatch(
        rf"clip:clip\d+ [0-9a-f]{{8}} \(transformers {re.escape(transformers.__version__)}\)", scorer.name
    )


def test_folder_of_another_model_family_is_a_one_line_error(folder, tmp_path):
    config = json.load(open(f"{folder}/config.json"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))
    with pytest.raises(ValueError, match=r'^clip:.*has model_type "siglip", not "clip"\. Give a folder .*\.$'):
        ClipScorer(str(tmp_path))
