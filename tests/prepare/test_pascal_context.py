"""LabelMaps in .mat files become records. SciPy's reading of the same files is the reference."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.io
from PIL import Image

from mqformer_jax.input.record import Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.prepare import cli

H, W = 24, 40
OFFICIAL = {
    1: "accordion",
    2: "aeroplane",
    19: "bedclothes",
    80: "cloth",
    308: "pottedplant",
    360: "sky",
    397: "table",
    427: "tvmonitor",
}


@pytest.fixture
def voc(tmp_path):
    """Writes one picture and its LabelMap into the official folders."""
    for folder in ("JPEGImages", "trainval"):
        (tmp_path / folder).mkdir()
    names = [f"{i}: {OFFICIAL.get(i, f'label {i}')}" for i in range(1, 460)]
    (tmp_path / "labels.txt").write_text("\n".join(names) + "\n\n")
    few = ["aeroplane", "diningtable", "pottedplant", "sky", "bedcloth", "clothes"]
    (tmp_path / "59_labels.txt").write_text("".join(f"{i}: {name}\n" for i, name in enumerate(["background", *few])))

    def write(name: str, label_map: np.ndarray, compressed: bool = True, size: tuple[int, int] = (H, W)) -> None:
        picture = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        scipy.io.savemat(
            tmp_path / "trainval" / f"{name}.mat",
            {"info": {"by": "x"}, "none": [], "LabelMap": label_map},
            do_compression=compressed,
        )

    write.root = tmp_path
    return write


def _prepare(voc, **options):
    root = voc.root
    options = {
        "images": root / "JPEGImages",
        "labels": root / "trainval",
        "names": root / "labels.txt",
        "output": root / "out",
        **options,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    if cli.main(["pascal_context", "--name", "context", "--split", "val", "--workers", "1", *words]):
        return None, {}
    source = ShardSource(str(root / "out"), "context", "val")
    return source.info, {r.key: r for r in (Record.from_bytes(source[i]) for i in range(len(source)))}


def _rows(*values, dtype=np.uint16):
    return np.repeat(np.array(values, dtype), H // len(values))[:, None].repeat(W, 1)


@pytest.mark.parametrize(
    ("classes", "compressed", "dtype"),
    [(None, True, np.uint16), ("59_labels.txt", False, np.uint16), (None, False, np.int32)],
)
def test_each_listed_label_becomes_one_region(voc, classes, compressed, dtype):
    labels = np.random.default_rng(1).choice([0, 1, 2, 19, 80, 308, 360, 397, 459], (H, W)).astype(dtype)
    voc("2008_000002", labels, compressed)
    info, records = _prepare(voc, **({"classes": voc.root / classes} if classes else {}))
    wanted = {2: "aeroplane", 397: "table", 308: "potted plant", 360: "sky", 19: "bedclothes", 80: "cloth"}
    if classes is None:
        wanted = {
            i: {308: "potted plant", 427: "tv monitor"}.get(i, OFFICIAL.get(i, f"label {i}")) for i in range(1, 460)
        }
    assert [c.texts for c in info.classes] == [(name,) for name in wanted.values()]
    assert info.exhaustive and all(c.is_region for c in info.classes)
    truth = scipy.io.loadmat(voc.root / "trainval" / "2008_000002.mat")["LabelMap"]
    record = records["2008_000002"]
    assert {list(wanted)[s.class_id] for s in record.segments} == set(np.unique(truth).tolist()) & wanted.keys()
    assert len(record.segments) == len({s.class_id for s in record.segments})
    for segment in record.segments:
        np.testing.assert_array_equal(record.decode_mask(segment.mask), truth == list(wanted)[segment.class_id])
    np.testing.assert_array_equal(record.decode_mask(record.ignore), ~np.isin(truth, list(wanted)))


def test_list_file_selects_the_images_of_a_split(voc):
    for name in ("2008_000002", "2008_000003", "2008_000007"):
        voc(name, _rows(360))
    (voc.root / "val.txt").write_text("2008_000003  1\n2008_000007 -1\n")
    assert sorted(_prepare(voc, list=voc.root / "val.txt")[1]) == ["2008_000003", "2008_000007"]


def test_broken_images_and_label_maps_are_counted_and_named(voc, capsys):
    folder = voc.root / "trainval"
    for name in ("good", "cut", "cut_plain", "bits", "code", "junk", "other"):
        voc(name, _rows(2, 460), compressed=name not in ("cut_plain", "code"))
    voc("ghost", _rows(2))
    voc("large", _rows(2), size=(H, W + 1))
    voc("halves", _rows(0.5, 2, dtype=np.float64))
    voc("void", _rows(0))
    (voc.root / "JPEGImages" / "ghost.jpg").unlink()
    for name, change in {
        "cut": lambda b: b[:-5],
        "cut_plain": lambda b: b[:-500],
        "bits": lambda b: b[:-20] + bytes([b[-20] ^ 1]) + b[-19:],
        # The type of the numbers, which makes scipy.io.loadmat crash.
        "code": lambda b: b.replace(b"LabelMap\x04\0\0\0", b"LabelMap\xca\0\0\0"),
        "junk": lambda b: b"\x89HDF\r\n" + b,
        "other": lambda b: b"",
    }.items():
        (folder / f"{name}.mat").write_bytes(change((folder / f"{name}.mat").read_bytes()))
    scipy.io.savemat(folder / "other.mat", {"Label": _rows(2)})
    (voc.root / "list.txt").write_text("\n".join(["gone", *(p.stem for p in sorted(folder.iterdir()))]))
    Image.new("RGB", (W, H)).save(voc.root / "JPEGImages" / "gone.jpg")
    _, records = _prepare(voc, list=voc.root / "list.txt")
    assert list(records) == ["good"] and records["good"].decode_mask(records["good"].ignore)[H // 2 :].all()
    table = capsys.readouterr().out
    for line in (
        "1 images kept, 11 dropped",
        "6 x image: mask is damaged or not a MATLAB 5 file of integers (bits, code, cut, …)",
        "image: mask file has no LabelMap (other)",
        "image: mask file is missing (gone)",
        "image: mask size differs from its image (large)",
        "image: file is missing (ghost)",
        "image: has nothing labeled (void)",
        "segment: mask value 460 has no class (good)",
    ):
        assert line in table, table


@pytest.mark.parametrize(
    ("option", "text", "said"),
    [
        ("classes", "1: aeroplane\n2: unicorn\n", "classes: class 'unicorn' is not in"),
        ("names", "aeroplane\n", "names: line 'aeroplane' does not look like '3: air conditioner'"),
        ("names", "1: sky\n2: sky\n", "names: class 'sky' occurs twice"),
        ("names", "", "names: it contains no classes"),
        ("names", b"1: caf\xe9\n", "names: not a text file in UTF-8"),
        ("list", "", "list: it lists no images"),
        ("list", None, "list: no such file"),
        ("labels", None, "labels: no such folder"),
    ],
)
def test_invalid_inputs_are_one_line_errors(voc, capsys, option, text, said):
    voc("2008_000002", _rows(360))
    if text is not None:
        (voc.root / option).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert _prepare(voc, **{option: voc.root / option})[0] is None
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error, error
