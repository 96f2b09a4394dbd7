"""Which format a file is in: told by its content, and what is said of a file that is in none."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import old, pt
from builders import st as files
from builders.pickles import tensor
from conftest import refused
from containers import initializer, onnx_model, packed

from ckpt_cli.errors import CkptError, FormatError, TruncatedError, UnknownFormatError
from ckpt_cli.files.lock import try_lock
from ckpt_cli.files.source import LocalFile
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.registry import FORMATS

ZIP = pt.archive(pt.torch_records({"a": tensor("0", (2,))}, {"0": bytes(8)}))
SAFETENSORS = files.file({"a": files.info("F32", [2], 0, 8)}, bytes(8))


def legacy() -> bytes:
    """What torch.save wrote before 1.6."""
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def tar() -> bytes:
    """What torch.save wrote before 0.2, and what many an archive is."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        made.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


def npy() -> bytes:
    """A numpy array."""
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    return buffer.getvalue()


LOOKS: dict[str, tuple[bytes, str]] = {
    "a tar file": (tar(), "a tar file, but not one of torch.save's: it has no member 'tensors'"),
    "gzip": (gzip.compress(ZIP), "a gzip file with a zip file inside: unpack it first"),
    "gzip of safetensors": (gzip.compress(SAFETENSORS), "a gzip file with a safetensors file inside: unpack it first"),
    "gzip of text": (gzip.compress(b"hello"), "a gzip file with a text file inside: unpack it first"),
    "half a gzip header": (b"\x1f\x8b\x08", "a gzip file: unpack it first"),
    "xz": (lzma.compress(ZIP), "an xz file with a zip file inside: unpack it first"),
    "bzip2": (bz2.compress(ZIP), "a bzip2 file: unpack it first"),
    "zstandard": (b"\x28\xb5\x2f\xfd" + bytes(20), "a zstandard file: unpack it first"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(20), "this looks like a 7z archive: unpack it first"),
    "rar": (b"Rar!\x1a\7\1\0" + bytes(20), "this looks like a rar archive: unpack it first"),
    "msgpack": (b"\x81\xa6params\x81\xa5Dense\x80", "a msgpack file without arrays, so not one that Flax wrote"),
    "ONNX": (b"\x08\x0a\x12\x07pytorch\x1a\x042.13", "an ONNX model without initializers: it has no weights"),
    "a SavedModel": (b"\x08\x01\x12\xa0\x10\x0a\x07\x0a\x05serve", "this looks like a TensorFlow SavedModel"),
    "a TensorFlow index": (b"\0\0\6\x08\1\x1a\2\x08\1\0", "this looks like the index of a TensorFlow checkpoint"),
    "TensorFlow Lite": (b"\x1c\0\0\0TFL3" + bytes(20), "this looks like a TensorFlow Lite model"),
    "ggml": (b"lmgg" + bytes(20), "this looks like a model of ggml from before GGUF"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(16), "this looks like a GGUF file, which is not read yet"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(20), "an HDF5 file (Keras, PyTables), which is read by the package h5py"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(20), "this looks like a PNG picture"),
    "git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
                "this looks like a git LFS pointer: fetch the real file with git lfs pull"),
    "a web page": (b"<!DOCTYPE HTML>\n<HTML><head>", "this looks like a web page: the download got an error page"),
    "a JSON list": (b"[1, 2]", "this looks like a JSON file"),
    "zeros": (bytes(5000), "this looks like a file of zero bytes: a download or a copy that was cut short"),
    "text": (b"hello, world\n", "this looks like a text file"),
    "Python": (Path(__file__).read_bytes(), "this looks like a text file"),
    "an angle bracket": (b"<", "this looks like a text file"),
}  # fmt: skip

UNKNOWN = {
    "random bytes": b"\xde\xad\xbe\xef" * 40,
    "a zip with leading junk": b"\1junk" + ZIP,
    "a safetensors file without its length": SAFETENSORS[8:].replace(b"{", b"\1", 1),
    "one byte": b"\xff",
    "a program": b"\x7fELF" + bytes(100),
}


def write(folder: Path, content: bytes, name: str = "model.bin") -> Path:
    """A file of that content."""
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "model.gguf", "model", "model.tar.gz", ".txt"])
def test_content_and_not_the_suffix_decides(name: str, tmp_path: Path) -> None:
    assert open_checkpoint(str(write(tmp_path, ZIP, name))).format == "zip"
    assert open_checkpoint(str(write(tmp_path, SAFETENSORS, name))).format == "safetensors"


@pytest.mark.parametrize("name", LOOKS)
def test_a_file_that_is_no_checkpoint_is_called_what_it_looks_like(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    content, words = LOOKS[name]
    path = write(tmp_path, content)
    with pytest.raises(UnknownFormatError) as refused:
        open_checkpoint(str(path))
    assert str(refused.value).startswith(f"{path}: {words}")
    packed = next((tool for tool, magic in PACKERS.items() if content.startswith(magic)), None)
    expected = f"{packed} -dc {path} > {path}.unpacked" if packed else HINTS.get(name)
    assert refused.value.hint == expected


HINTS = {"JSON": "name the checkpoint itself, or the folder that it lies in", "a tar file": "tar -xf unpacks it",
         "HDF5": "pip install 'ckpt-edit[h5]'"}  # fmt: skip
PACKERS = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ", "bzip2": b"BZh"}


@pytest.mark.parametrize(
    ("name", "unpacked"), [("a b.pt.gz", "a b.pt"), ("model.tgz", "model"), ("m.pt", "m.pt.unpacked")]
)
def test_the_hint_of_a_compressed_file_is_a_command_that_unpacks_it(name: str, unpacked: str, tmp_path: Path) -> None:
    path = write(tmp_path, gzip.compress(ZIP), name)
    with pytest.raises(UnknownFormatError) as refused:
        open_checkpoint(str(path))
    assert refused.value.hint is not None
    subprocess.run(refused.value.hint, shell=True, check=True)
    assert (tmp_path / unpacked).read_bytes() == ZIP


@pytest.mark.parametrize(
    "text", ["cats and dogs", "I am", "(a) first", "list\n", "Lorem ipsum", "} end", "NaN\n", "S\n"]
)
def test_text_is_not_taken_for_an_old_pickle(text: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownFormatError, match="a text file"):
        open_checkpoint(str(write(tmp_path, text.encode() * 50)))


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_file_that_looks_like_nothing_gets_a_hint(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, UNKNOWN[name])
    with pytest.raises(UnknownFormatError) as refused:
        open_checkpoint(str(path))
    assert str(refused.value) == f"{path}: not a checkpoint of a kind that ckpt knows"
    assert refused.value.hint == "ckpt reads files of torch.save, safetensors, numpy and pickle"


def test_an_empty_file_is_said_to_be_empty(tmp_path: Path) -> None:
    with pytest.raises(TruncatedError, match="the file is empty"):
        open_checkpoint(str(write(tmp_path, b"")))


@pytest.mark.parametrize("content", [ZIP, SAFETENSORS], ids=["zip", "safetensors"])
def test_every_beginning_of_a_file_is_refused_in_words(content: bytes, tmp_path: Path) -> None:
    for length in range(0, len(content) - 1, 7):
        with pytest.raises(CkptError) as refused:
            open_checkpoint(str(write(tmp_path, content[:length])))
        assert refused.value.path == str(tmp_path / "model.bin")


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_checkpoint(str(tmp_path / "missing"))
    with pytest.raises(UnknownFormatError, match="a folder without a checkpoint"):
        open_checkpoint(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="not a regular file"):
        open_checkpoint(str(tmp_path / "pipe"))
    with pytest.raises(FormatError, match="not a regular file"):
        open_checkpoint("/dev/zero")


def test_a_file_that_is_refused_is_closed(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for content in (b"hello", ZIP[:300], SAFETENSORS[:20], b""):
        with pytest.raises(CkptError):
            open_checkpoint(str(write(tmp_path, content)))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_checkpoint_opened_to_write_is_locked_until_it_is_closed(tmp_path: Path) -> None:
    path = str(write(tmp_path, ZIP))
    checkpoint = open_checkpoint(path, write=True)
    other = LocalFile(path)
    assert not try_lock(other.fd)
    checkpoint.close()
    assert try_lock(other.fd)


def test_a_file_that_is_refused_is_not_left_locked(tmp_path: Path) -> None:
    path = str(write(tmp_path, b"hello"))
    with pytest.raises(UnknownFormatError):
        open_checkpoint(path, write=True)
    assert try_lock(LocalFile(path).fd)


def test_a_symlink_is_followed(tmp_path: Path) -> None:
    link = tmp_path / "link.pt"
    link.symlink_to(write(tmp_path, ZIP))
    checkpoint = open_checkpoint(str(link))
    assert (checkpoint.path, checkpoint.format) == (str(link), "zip")


def npz() -> bytes:
    """Several numpy arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    return buffer.getvalue()


SAMPLES = {
    "zip": ZIP,
    "safetensors": SAFETENSORS,
    "legacy": legacy(),
    "pickle": pickle.dumps([1]),
    "npy": npy(),
    "npz": npz(),
    "msgpack": packed({"a": torch.ones(2)}),
    "onnx": onnx_model(initializer("a", torch.ones(2))),
    "tar": old.tar({}, [], []),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_only_the_module_of_the_format_is_imported(name: str, tmp_path: Path) -> None:
    code = "import sys; from ckpt_cli.formats import open_checkpoint; open_checkpoint(sys.argv[1]); print(*sys.modules)"
    path = write(tmp_path, SAMPLES[name])
    modules = set(subprocess.check_output([sys.executable, "-c", code, str(path)], text=True).split())
    (module,) = {known.module for known in FORMATS if known.name == name}
    assert {other.module for other in FORMATS} & modules <= {module, "ckpt_cli.formats.numpy.npy"}
    assert not {"torch", "numpy", "pickle", "tarfile", "zipfile"} & modules


def test_a_journal_that_was_left_is_dealt_with_first(tmp_path: Path) -> None:
    path = write(tmp_path, ZIP)
    journal = tmp_path / ".model.bin.ckpt-journal"
    journal.write_bytes(b"")
    assert open_checkpoint(str(path)).format == "zip"
    assert not journal.exists()


def _field(number: int, content: bytes) -> bytes:
    """A field of a protobuf that has a length; lengths below 128."""
    key = number << 3 | 2
    return (bytes([key & 127 | 128, key >> 7]) if key > 127 else bytes([key])) + bytes([len(content)]) + content


@pytest.mark.parametrize("version", [1, 4, 9])
@pytest.mark.parametrize("number", [1, 10])
def test_a_core_ml_model_is_called_that_by_its_description(tmp_path: Path, version: int, number: int) -> None:
    feature = _field(number, _field(1, b"image") + _field(3, _field(5, b"\x08\x03")))
    (tmp_path / "m").write_bytes(bytes([8, version]) + _field(2, feature) + _field(100, b"\x0a\x04conv"))
    assert "a Core ML model" in str(refused(str(tmp_path / "m")))


@pytest.mark.parametrize("producer", [b"pytorch", b"", "exporté".encode()])
def test_an_onnx_model_is_called_that_whoever_wrote_it(tmp_path: Path, producer: bytes) -> None:
    (tmp_path / "m").write_bytes(b"\x08\x08" + _field(2, producer) + _field(3, b"2.1") + _field(7, b"\x0a\x02ab"))
    assert "an ONNX model" in str(refused(str(tmp_path / "m")))


def test_a_protobuf_that_is_neither_is_not_called_onnx(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"\x08\x04" + _field(2, b"\x22\x03\x08\x01\x01" * 4))
    assert "ONNX" not in str(refused(str(tmp_path / "m")))
