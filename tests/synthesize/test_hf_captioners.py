"""Captions of boxes by BLIP, BLIP-2 and Florence-2, against transformers asked for one box at a time. The weights are
random and tiny.
"""

from __future__ import annotations

import json
import os
import re
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.parity

from PIL import Image  # noqa: E402

from mqformer_jax.input.record import DatasetInfo, Record  # noqa: E402
from mqformer_jax.synthesize import hf_captioners, hugging_face  # noqa: E402
from mqformer_jax.synthesize.hf_captioners import CAPTIONS, Blip, Blip2, Florence2  # noqa: E402
from mqformer_jax.synthesize.hugging_face import crop, teacher_name  # noqa: E402
from mqformer_jax.synthesize.teachers import CAPTIONERS, Picture, make_teacher  # noqa: E402

WORDS = "a red dog cat on the blue car big sits green bus with two small".split()
KINDS = {"blip": Blip, "blip2": Blip2, "florence2": Florence2}
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
VISION = SMALL | dict(image_size=32, patch_size=8)
TOKENS = 8  # enough, and quick
RECORD, INFO = Record("unread", b"", 60, 90), DatasetInfo("unread", (), {})


def tokenizer(words: list[str], locations: int = 0, **special: str):
    """Every word, and nothing but words, is a token."""
    words = [*special.values(), *WORDS, *words]
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    image = {"image_token": special.pop("image_token")}
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=model, extra_special_tokens=image, **special)
    found.add_tokens(
        [tokenizers.AddedToken(f"<loc_{i}>", special=True, normalized=False) for i in range(locations)],
        special_tokens=True,
    )
    return found


def images(**options):
    return transformers.BlipImageProcessor(size=dict(height=32, width=32), **options)


def blip():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    words = transformers.BertTokenizer(vocab={word: i for i, word in enumerate([*special, *WORDS])}, bos_token="[DEC]")
    text = SMALL | dict(
        vocab_size=len(words), encoder_hidden_size=32, projection_dim=16, pad_token_id=0, bos_token_id=5
    )
    text |= dict(eos_token_id=3, sep_token_id=3)
    config = transformers.BlipConfig(text_config=text, vision_config=VISION, projection_dim=16)
    return transformers.BlipForConditionalGeneration(config), transformers.BlipProcessor(images(), words)


def blip2():
    words = tokenizer(
        [], pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>", image_token="<image>"
    )
    sizes = dict(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32)
    text = transformers.OPTConfig(
        **sizes, vocab_size=len(words), max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=2
    )
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=SMALL | dict(encoder_hidden_size=32, vocab_size=8),
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=words.image_token_id,
    )
    return transformers.Blip2ForConditionalGeneration(config), transformers.Blip2Processor(
        images(), words, num_query_tokens=4
    )


def florence2():
    special = dict(bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>", image_token="<image>")
    words = tokenizer("What does region describe ?".split(), locations=1000, **special)
    sizes = {
        f"{part}_{what}": n
        for part in ("encoder", "decoder")
        for what, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 64))
    }
    ids = dict(bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2)
    text = dict(model_type="bart", vocab_size=len(words), d_model=32, max_position_embeddings=128, **sizes, **ids)
    four = dict(embed_dim=(8, 16, 16, 32), depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2), num_groups=(2, 2, 2, 2))
    vision = dict(window_size=2, projection_dim=32, **four)
    config = transformers.Florence2Config(text_config=text, vision_config=vision, image_token_id=words.image_token_id)
    seen = images()
    seen.image_seq_length = 2  # 32 pixels are one place of the last stage, and there is the mean of all
    return transformers.Florence2ForConditionalGeneration(config), transformers.Florence2Processor(seen, words)


@pytest.fixture(scope="module", autouse=True)
def quick():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small to share out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_captioners, "TOKENS", TOKENS)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A tiny model of each kind with its processor, as save_pretrained leaves them."""
    root = tmp_path_factory.mktemp("captioners")
    for seed, make in enumerate((blip, blip2, florence2)):
        torch.manual_seed(seed)
        model, processor = make()
        for parameter in model.parameters():
            if parameter.ndim > 1:  # or all pictures look the same to it
                torch.nn.init.normal_(parameter, std=0.3)
        if make is florence2:  # 1,000 locations are not to drown the words, nor their places the locations
            ids = processor.tokenizer.convert_tokens_to_ids
            shared = model.get_input_embeddings().weight.data
            shared[ids("<loc_0>") :] *= 0.3
            shared[[ids(word) for word in WORDS]] *= 3
            model.model.language_model.encoder.embed_positions.weight.data *= 0.1
        model.save_pretrained(root / make.__name__)
        processor.save_pretrained(root / make.__name__)
    return {kind: str(root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def captioners(folders):
    return {name: kind(folders[name]) for name, kind in KINDS.items()}


def picture(boxes: list[list[float]], seed: int = 0) -> Picture:
    """Blobs of color, which a small model can tell apart."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    image = np.asarray(Image.fromarray(small).resize((90, 60), Image.NEAREST))
    return Picture(RECORD, INFO, image, tuple(range(len(boxes))), np.array(boxes, np.float64).reshape(-1, 4))


PICTURES = [
    picture([[10, 10, 30, 30], [5, 20, 85, 40], [60.5, 0, 90, 30]]),
    picture([]),
    picture([[0, 0, 90, 60], [0, 30, 40, 60], [50, 20, 60, 21]], seed=1),
]
# a tenth more on each side
CROPS = [
    [(8, 8, 32, 32), (0, 18, 90, 42), (57, 0, 90, 33)],
    [],
    [(0, 0, 90, 60), (0, 27, 44, 60), (49, 19, 61, 22)],
]
BINS = [
    [(111, 166, 333, 500), (55, 333, 944, 666), (672, 0, 999, 500)],
    [],
    [(0, 0, 999, 999), (0, 500, 444, 999), (555, 333, 666, 350)],
]


@pytest.fixture(scope="module")
def answers(captioners):
    return {name: captioner(PICTURES) for name, captioner in captioners.items()}


def plain(name: str, folder: str, number: int, box: int) -> tuple[list[str], list[float]]:
    """The five captions and scores of one box, as transformers' own examples ask for them."""
    model = KINDS[name].model_class.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    image, prompt, extra = Image.fromarray(PICTURES[number].image), {}, {}
    if name == "florence2":
        prompt = dict(text="<REGION_TO_DESCRIPTION>" + "".join(f"<loc_{i}>" for i in BINS[number][box]))
        extra = dict(logits_processor=[Folded(processor.tokenizer)])
    else:
        image = image.crop(CROPS[number][box])
    inputs = processor(images=image, return_tensors="pt", **prompt)
    search = dict(num_beams=CAPTIONS, num_return_sequences=CAPTIONS, max_new_tokens=TOKENS)
    found = model.generate(**inputs, **search, **extra, return_dict_in_generate=True, output_scores=True)
    texts = [processor.decode(sequence, skip_special_tokens=True).strip() for sequence in found.sequences]
    return texts, [float(np.exp(score)) for score in found.sequences_scores]


class Folded(transformers.LogitsProcessor):
    """Every location is the end, slowly."""

    def __init__(self, words) -> None:
        self.end, self.locations = words.eos_token_id, {words.convert_tokens_to_ids(f"<loc_{i}>") for i in range(1000)}

    def __call__(self, input_ids, scores):
        probabilities = scores.double().exp().numpy()
        for row in probabilities:
            row[self.end] += sum(row[i] for i in self.locations)
            row[list(self.locations)] = 0
        with np.errstate(divide="ignore"):
            return torch.from_numpy(np.log(probabilities)).float()


@pytest.mark.parametrize("name", KINDS)
def test_captions_and_scores_match_transformers_for_single_boxes(name, answers, folders):
    assert [len(boxes) for boxes in answers[name]] == [3, 0, 3]
    for number, boxes in enumerate(answers[name]):
        for box, captions in enumerate(boxes):
            texts, scores = plain(name, folders[name], number, box)
            assert [caption.text for caption in captions] == texts
            np.testing.assert_allclose([caption.score for caption in captions], scores, rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_each_box_has_five_captions_sorted_by_score(name, answers):
    found = [captions for boxes in answers[name] for captions in boxes]
    for captions in found:
        scores = [caption.score for caption in captions]
        assert len(scores) == CAPTIONS and scores == sorted(scores, reverse=True) and 0 < scores[-1] and scores[0] < 1
        assert not any("<" in caption.text or "[" in caption.text for caption in captions)
    assert len({tuple(caption.text for caption in captions) for captions in found}) == len(found)


@pytest.mark.parametrize("name", KINDS)
def test_chunk_size_does_not_change_the_captions(name, captioners, answers, monkeypatch):
    for chunk in (1, 2):
        monkeypatch.setattr(hf_captioners, "CHUNK", chunk)
        for boxes, others in zip(captioners[name](PICTURES), answers[name], strict=True):
            for captions, wanted in zip(boxes, others, strict=True):
                assert [caption.text for caption in captions] == [caption.text for caption in wanted]
                np.testing.assert_allclose([c.score for c in captions], [c.score for c in wanted], rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_empty_inputs_give_no_captions(name, captioners):
    assert captioners[name]([]) == [] and captioners[name]([picture([])]) == [[]]


def test_florence_captions_end_at_location_tokens_and_are_distinct(answers, captioners, folders):
    """The score by hand: the mean over the caption's words and its end, where the end is </s> or any location."""
    model = transformers.Florence2ForConditionalGeneration.from_pretrained(folders["florence2"]).eval()
    captioner, pic = captioners["florence2"], PICTURES[0]
    words = captioner.processor.tokenizer
    locations = [words.convert_tokens_to_ids(f"<loc_{i}>") for i in range(1000)]
    inputs = captioner._inputs([(pic, pic.boxes[1])])
    assert (
        words.decode(inputs.input_ids[0][-7:-2]).replace(" ", "")
        == "".join(f"<loc_{i}>" for i in BINS[0][1]) + "describe"
    )
    captions = answers["florence2"][0][1]
    assert (
        len({caption.text for caption in captions}) == CAPTIONS
        and sum(len(c.text.split()) < TOKENS - 1 for c in captions) > 1
    )
    for caption in captions:
        said = words.convert_tokens_to_ids(caption.text.split())
        if len(said) < TOKENS - 1:  # it came to its own end
            with torch.no_grad():
                ahead = model(**inputs, decoder_input_ids=torch.tensor([[2, *said]])).logits[0].softmax(-1)
            terms = [ahead[i, token] for i, token in enumerate(said)] + [ahead[-1, locations].sum() + ahead[-1, 2]]
            assert caption.score == pytest.approx(float(np.exp(np.mean(np.log(terms)))), rel=1e-4)


def test_generation_config_of_the_checkpoint_is_ignored(folders, answers, tmp_path):
    shutil.copytree(folders["florence2"], tmp_path, dirs_exist_ok=True)
    said = json.load(open(tmp_path / "generation_config.json"))
    said |= dict(num_beams=3, do_sample=True, temperature=9.0, length_penalty=3.0, early_stopping=True, max_length=4)
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert Florence2(str(tmp_path))(PICTURES) == answers["florence2"]


@pytest.mark.parametrize("name", KINDS)
def test_half_precision_gives_nearly_the_same_best_score(name, folders, answers, monkeypatch):
    for module in (hugging_face, hf_captioners):
        monkeypatch.setattr(module, "device", lambda: (torch.device("cpu"), torch.float16))
    captioner = KINDS[name](folders[name])
    assert torch.float16 in {parameter.dtype for parameter in captioner.model.parameters()}
    for captions, wanted in zip(captioner(PICTURES)[0], answers[name][0], strict=True):
        assert captions[0].score == pytest.approx(wanted[0].score, rel=0.05)


def test_crop_is_the_box_plus_ten_percent_per_side_within_the_image():
    for pic, wanted in zip(PICTURES, CROPS):
        for box, (x0, y0, x1, y1) in zip(pic.boxes, wanted, strict=True):
            np.testing.assert_array_equal(crop(pic.image, box), pic.image[y0:y1, x0:x1])
    tiny = [
        crop(PICTURES[0].image, np.array(box)).shape
        for box in ([89.9, 59.9, 90, 60], [0, 0, 0.1, 0.1], [7.2, 5.2, 7.3, 5.3])
    ]
    assert tiny == [(1, 1, 3)] * 3


@pytest.mark.parametrize("name", KINDS)
def test_captioner_is_made_by_name_and_its_name_includes_the_version(name, folders, captioners):
    captioner = make_teacher(f"{name}:{folders[name]}/", CAPTIONERS)
    assert captioner.name == captioners[name].name and captioner.unique is False
    assert re.fullmatch(
        rf"{name}:{name} [0-9a-f]{{8}} \(transformers {re.escape(transformers.__version__)}\)", captioner.name
    )


def test_changed_weights_or_configuration_change_the_teacher_name(folders, tmp_path):
    shutil.copytree(folders["blip"], tmp_path / "blip")
    there = str(tmp_path / "blip")
    assert (first := teacher_name("blip", there, there)) == teacher_name("blip", folders["blip"], folders["blip"])
    weights = bytearray((tmp_path / "blip" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "blip" / "model.safetensors").write_bytes(weights)
    assert (second := teacher_name("blip", there, there)) != first
    (tmp_path / "blip" / "config.json").write_text("{}")
    assert teacher_name("blip", there, there) not in (first, second)


def refused(where: object, kind: type = Blip) -> str:
    """The message, which is one line."""
    with pytest.raises(ValueError) as error:
        kind(str(where))
    message = str(error.value)
    assert message.startswith(f"{kind.family}:{where}: ") and "\n" not in message and len(message) < 700
    return message


def test_unloadable_model_is_a_one_line_error(folders, tmp_path, monkeypatch):
    assert "no such folder" in refused("/no/such/folder") and "no such folder" in refused("../nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "hf download somebody/something --local-dir FOLDER" in refused("somebody/something")
    assert 'model_type "blip", not "blip-2"' in refused(folders["blip"], Blip2)
    assert "save_pretrained of BlipForConditionalGeneration" in refused(tmp_path)


def test_incomplete_model_folder_is_a_one_line_error(folders, tmp_path):
    def broken(change) -> str:
        shutil.rmtree(tmp_path)
        shutil.copytree(folders["blip"], tmp_path)
        change()
        return refused(tmp_path)

    def lose_a_tensor() -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(tmp_path / "model.safetensors")
        del tensors["vision_model.encoder.layers.1.mlp.fc1.bias"]
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})

    assert "lack 1 tensors, such as vision_model.encoder.layers.1.mlp.fc1.bias" in broken(lose_a_tensor)
    assert "model.safetensors" in broken(lambda: os.remove(tmp_path / "model.safetensors"))
    assert refused(tmp_path) and broken(lambda: os.truncate(tmp_path / "model.safetensors", 5000))
    assert "image processor" in broken(lambda: os.remove(tmp_path / "processor_config.json"))
    assert "has no vocabulary" in broken(lambda: os.remove(tmp_path / "tokenizer.json"))


def test_pickled_weights_are_rejected(folders, tmp_path):
    shutil.copytree(folders["blip"], tmp_path, dirs_exist_ok=True)
    os.remove(tmp_path / "model.safetensors")
    model = transformers.BlipForConditionalGeneration.from_pretrained(folders["blip"])
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert transformers.BlipForConditionalGeneration.from_pretrained(str(tmp_path))  # which by itself it would
    assert "safetensors" in refused(tmp_path)
