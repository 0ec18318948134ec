"""Every header and the index are checked to the last byte before anything is loaded; the safetensors library agrees."""

import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from simpo_pipeline.errors import ModelError
from simpo_pipeline.model import safetensors_files
from simpo_pipeline.model.safetensors_files import parse_object, same_values, stored_tensors
from simpo_pipeline.storage.files import write_bytes

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.float16),
    "empty": np.zeros((0, 3), np.float32),
}
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 16060556376\n"
)


def packed(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file with this header, which is JSON or any other bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(*shape: int, dtype: str = "F32", begin: int = 0, size: int = 4, **others: object) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + math.prod(shape) * size], **others}


def library_reads(path: Path) -> dict[str, tuple] | None:
    """Return the dtype and shape of each tensor according to the safetensors library; None if it refuses the file."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
    except SafetensorError:
        return None


def test_a_file_is_described_as_the_library_describes_it(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = stored_tensors(str(tmp_path))
    assert {name: (each.dtype, each.shape) for name, each in found.items()} == library_reads(
        tmp_path / "model.safetensors"
    )
    data = (tmp_path / "model.safetensors").read_bytes()
    for name, tensor in TENSORS.items():
        assert data[found[name].start : found[name].start + found[name].num_bytes] == tensor.tobytes()


BROKEN = {
    "an LFS pointer": (POINTER, "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
    "an empty file": (b"", "it has only 0 bytes"),
    "a few bytes": (b"\x00" * 7, "it has only 7 bytes"),
    "a web page": (b"<!DOCTYPE html><html></html>", r"announces a header of \d{10}"),
    "half a file": (save(TENSORS)[:-9], r"it has \d+ bytes, but its header describes \d+"),
    "half a header": (save(TENSORS)[:60], r"it has 60 bytes, but announces a header of \d+"),
    "bytes past the end": (save(TENSORS) + b"\x00", r"it has \d+ bytes, but its header describes \d+"),
    "no header": (packed(b""), "it has no header"),
    "zeros": (b"\x00" * 64, "it has no header"),
    "a header of text": (packed(b"{torn"), "the header of .* is not JSON"),
    "UTF-16": (packed('{"a": 1}'.encode("utf-16-le")), "is not JSON"),
    "not an object": (packed(b"[]"), "it has no header"),
    "a deep header": (packed(b'{"a":' * 50_000), "is not JSON"),
    "a number of many digits": (packed(b'{"a":' + b"9" * 5000 + b"}"), "is not JSON"),
    "half a surrogate pair": (packed(rb'{"\ud800": 1}'), "is not JSON"),
    "a name twice": (packed(b'{"a": {}, "a": {}}'), "'a' occurs twice"),
    "metadata of numbers": (packed({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata that is null": (packed({"__metadata__": None}), "__metadata__ is None"),
    "an entry of text": (packed({"a": "F32"}), "its entry of 'a' is 'F32'"),
    "an entry without shape": (packed({"a": {"dtype": "F32", "data_offsets": [0, 4]}}), "its entry of 'a'"),
    "an entry with more keys": (packed({"a": entry(1, scale=2)}, b"\x00" * 4), "its entry of 'a'"),
    "one offset": (packed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4]}}), "its entry of 'a'"),
    "a negative size": (packed({"a": entry(-1)}), r"the impossible shape \[-1\]"),
    "a size of true": (packed({"a": {**entry(1), "shape": [True]}}, b"\x00" * 4), "the impossible shape"),
    "a fractional size": (packed({"a": {**entry(1), "shape": [1.0]}}, b"\x00" * 4), "the impossible shape"),
    "an enormous size": (packed({"a": {**entry(1), "shape": [2**64]}}), "the impossible shape"),
    "sizes that wrap around": (packed({"a": {**entry(1), "shape": [2**62, 4]}}, b"\x00" * 4), "has 4 bytes, which"),
    "endless dimensions": (packed({"a": {**entry(1), "shape": [1] * 999}}), "the impossible shape"),
    "negative offsets": (packed({"a": {**entry(1), "data_offsets": [-4, 0]}}), "the impossible shape"),
    "an unknown dtype": (packed({"a": entry(1, dtype="F31")}, b"\x00" * 4), "the unknown dtype 'F31'"),
    "too few bytes for the shape": (packed({"a": entry(3, size=2)}, b"\x00" * 6), "has 6 bytes, which is not what"),
    "a gap at the start": (packed({"a": entry(1, begin=4)}, b"\x00" * 8), "starts at byte"),
    "a gap": (packed({"a": entry(1), "b": entry(1, begin=8)}, b"\x00" * 12), "data of 'b' starts at byte"),
    "an overlap": (packed({"a": entry(2), "b": entry(2, begin=4)}, b"\x00" * 12), "data of 'b' starts at byte"),
    "the same bytes twice": (packed({"a": entry(1), "b": entry(1)}, b"\x00" * 4), "data of 'b' starts at byte"),
    "a header that is too large": (packed(b"{}", length=100_000_001), "announces a header of 100000001"),
    "a header of the largest length": (packed(b"{}", length=2**64 - 1), "announces a header of"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_refused_by_name_before_its_data_is_read(tmp_path, what):
    data, words = BROKEN[what]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=words) as refusal:
        stored_tensors(str(tmp_path))
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_whatever_the_library_refuses_is_refused(tmp_path):
    whole, path = save(TENSORS), tmp_path / "model.safetensors"
    header_end = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    accepted = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 5))):
            # Most positions are in the header. Digits, brackets and quotes have most of the meaning.
            at = draw.randrange(header_end if draw.random() < 0.9 else len(data))
            data[at] = draw.choice((draw.randrange(256), *b'0123456789{}[],:" '))
        path.write_bytes(data[: draw.choice((len(data), len(data), draw.randrange(len(data))))])
        try:
            found = {name: (each.dtype, each.shape) for name, each in stored_tensors(str(tmp_path)).items()}
        except ModelError:
            continue
        accepted += 1
        assert found == library_reads(path)
    assert accepted


def write_index(folder: Path, weight_map: object, **files: bytes) -> None:
    for name, data in files.items():
        (folder / f"{name}.safetensors").write_bytes(data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


A, B = save({"a": TENSORS["a"]}), save({"b": TENSORS["b"]})
FILES = {"a": "one.safetensors", "b": "two.safetensors"}


def test_an_index_gives_the_tensors_of_all_its_files(tmp_path):
    write_index(tmp_path, FILES, one=A, two=B, beside=b"not in the index")
    assert {name: os.path.basename(each.path) for name, each in stored_tensors(str(tmp_path)).items()} == FILES


@pytest.mark.parametrize(
    ("weight_map", "files", "words"),
    [
        (FILES, {"one": A}, r"names the file 'two\.safetensors', which is missing"),
        (FILES, {"one": A, "two": A}, r"says that two\.safetensors contains 'b', but it does not"),
        (
            FILES,
            {"one": A, "two": save(TENSORS)},
            r"two\.safetensors contains 'a' and 1 more tensors, which .* not list",
        ),
        (FILES, {"one": POINTER, "two": B}, r"one\.safetensors is a Git LFS pointer"),
        (FILES, {"one": A, "two": B[:-1]}, r"two\.safetensors is cut off"),
        (FILES | {"c": "two.safetensors"}, {"one": A, "two": B}, r"two\.safetensors contains 'c', but it does not"),
        ({"a": "one.safetensors"}, {"one": save({**TENSORS})}, r"'b' and 1 more tensors, which .* does not list"),
        ({}, {}, r"has weight_map: \{\}; it must give the file"),
        (None, {}, "has weight_map: None"),
        (["a"], {}, "has weight_map: "),
        ({"a": 1}, {}, "'a' is in 1; it must be the name of a safetensors file"),
        ({"a": "one.bin"}, {}, r"is in 'one\.bin'; it must be the name"),
        ({"a": ""}, {}, "is in ''; it must be the name"),
    ],
)
def test_an_index_that_contradicts_its_files_is_refused(tmp_path, weight_map, files, words):
    write_index(tmp_path, weight_map, **files)
    with pytest.raises(ModelError, match=words):
        stored_tensors(str(tmp_path))


@pytest.mark.parametrize(
    "kind", ["../{}", "sub/../../{}", "sub/{}", "{absolute}", "file://{absolute}", "..\\{}", "./{}"]
)
def test_an_index_that_leaves_the_folder_is_refused_and_nothing_there_is_read(tmp_path, kind, monkeypatch):
    outside, folder = tmp_path / "outside.safetensors", tmp_path / "model"
    outside.write_bytes(A)
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / outside.name).write_bytes(A)
    read: list[str] = []
    plain = safetensors_files.open_read
    monkeypatch.setattr(safetensors_files, "open_read", lambda path: read.append(path) or plain(path))
    write_index(folder, {"a": kind.format(outside.name, absolute=outside)})
    with pytest.raises(ModelError, match="must be the name of a safetensors file in the same folder"):
        stored_tensors(str(folder))
    assert read == []


@pytest.mark.parametrize("text", [b"{torn", b"[]", b"null", POINTER, b"\xff", b'{"weight_map": {"a": 1, "a": 2}}'])
def test_an_index_that_is_no_json_object_is_refused_by_name(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json (is|holds)"):
        stored_tensors(str(tmp_path))


def test_a_file_that_is_no_regular_file_is_missing(tmp_path):
    os.mkfifo(tmp_path / "one.safetensors")  # reading it would never end
    write_index(tmp_path, {"a": "one.safetensors"})
    with pytest.raises(ModelError, match=r"'one\.safetensors', which is missing"):
        stored_tensors(str(tmp_path))


def test_a_byte_order_mark_is_no_part_of_the_json():
    assert parse_object(b'\xef\xbb\xbf{"a": 1}', "config.json") == {"a": 1}


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_only_the_headers_are_read_from_a_bucket(gcs_here, gcs):
    num_bytes = 16_000_000
    write_bytes(f"{gcs_here}/model.safetensors", save({"a": np.zeros(num_bytes // 4, np.float32)}))
    gcs.reset_log()
    assert stored_tensors(gcs_here)["a"].num_bytes == num_bytes
    # gcsfs reads at least 5 MiB at once.
    assert 0 < sum(each["bytes"] for each in gcs.log() if each["method"] == "GET") < num_bytes / 2


def test_values_are_compared_whatever_their_dtypes_and_nan_equals_nan(tmp_path):
    values = np.array([[0.0, 1.5, -2.0], [math.nan, math.inf, 3.0]], np.float32)
    close = values.copy()
    close[1, 2] = np.nextafter(np.float32(3), np.float32(4))
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    header = {"bf16": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}
    (tmp_path / "bf16.safetensors").write_bytes(packed(header, bits.tobytes()))
    others = {"f32": values, "f16": values.astype(np.float16), "negative zero": -values * -1, "close": close}
    others |= {"flat": values.ravel()}
    others["negative zero"][0, 0] = -0.0
    save_file(others, tmp_path / "rest.safetensors")
    write_index(tmp_path, {"bf16": "bf16.safetensors"} | dict.fromkeys(others, "rest.safetensors"))
    stored = stored_tensors(str(tmp_path))
    same = {name for name in stored if same_values(stored["f32"], stored[name])}
    assert same == {"f32", "f16", "bf16", "negative zero"}


def test_large_tensors_are_compared_to_their_last_value(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_files, "_COMPARED_BYTES", 64)
    one = np.arange(100, dtype=np.float32)
    save_file({"one": one, "same": one.copy(), "last": one + (one == 99)}, tmp_path / "model.safetensors")
    stored = stored_tensors(str(tmp_path))
    assert same_values(stored["one"], stored["same"]) and not same_values(stored["one"], stored["last"])
