"""Structural edits of safetensors files, with the reference library as the judge of every result."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

State = dict[str, torch.Tensor]


def state() -> State:
    """Tensors of several widths, in an order that is neither that of their names nor of their widths."""
    torch.manual_seed(0)
    return {
        "module.b.weight": torch.randn(3, 4),
        "module.a.weight": torch.randn(5, dtype=torch.float64),
        "module.a.bias": torch.arange(3),
        "other.half": torch.randn(7).half(),
        "other.flag": torch.tensor([True, False, True]),
    }


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A file as the library writes it: a header without room."""
    path = tmp_path / "a.safetensors"
    save_file(state(), path, metadata={"format": "pt", "z": "last", "a": "first"})
    return path


def header(path: Path) -> dict[str, object]:
    """The header as it stands in the file."""
    raw = path.read_bytes()
    found: dict[str, object] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return found


def metadata(path: Path) -> dict[str, str]:
    """What the library says that the metadata is."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def assert_holds(path: Path, wanted: State) -> None:
    """The library reads these tensors, bit for bit, and no others."""
    found = load_file(path)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def report(answer: object) -> dict[str, object]:
    """What an edit with `--json` printed."""
    assert answer.code == 0, answer.err  # type: ignore[attr-defined]  # an Answer
    found: dict[str, object] = json.loads(answer.out)  # type: ignore[attr-defined]  # an Answer
    return found


RENAMINGS = {
    "one": (["module.a.bias", "module.a.offset"], {"module.a.bias": "module.a.offset"}),
    "prefix": (["module.a", "x.y"], {"module.a.weight": "x.y.weight", "module.a.bias": "x.y.bias"}),
    "strip": (["--strip", "module"],
              {"module.b.weight": "b.weight", "module.a.weight": "a.weight", "module.a.bias": "a.bias"}),
    "add": (["--add", "net."], {name: f"net.{name}" for name in state()}),
    "sub": (["--sub", r"^module\.(\w)", r"\1.m"],
            {"module.b.weight": "b.m.weight", "module.a.weight": "a.m.weight", "module.a.bias": "a.m.bias"}),
    "unicode": (["other.half", "später.½"], {"other.half": "später.½"}),
}  # fmt: skip


@pytest.mark.parametrize("case", RENAMINGS)
def test_a_renaming_gives_the_same_bytes_other_names(ckpt: Ckpt, plain: Path, case: str) -> None:
    arguments, names = RENAMINGS[case]
    before = header(plain)["__metadata__"]
    answer = report(ckpt("rename", plain, *arguments, "--json"))
    assert_holds(plain, {names.get(name, name): tensor for name, tensor in state().items()})
    assert metadata(plain) == {"format": "pt", "z": "last", "a": "first"}
    assert list(header(plain)["__metadata__"]) == list(before)  # type: ignore[call-overload]  # the library shuffles it
    assert answer["renamed"] == names
    assert answer["in_place"] is True


def test_a_map_renames_names_and_prefixes_and_each_must_be_there(tmp_path: Path, ckpt: Ckpt, plain: Path) -> None:
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"module.a": "first", "module.a.bias": "second.offset", "other.": "rest."}))
    assert ckpt("rename", plain, "--map", path).code == 0
    wanted = {"module.b.weight", "first.weight", "second.offset", "rest.half", "rest.flag"}
    assert load_file(plain).keys() == wanted
    path.write_text(json.dumps({"gone": "x"}))
    answer = ckpt("rename", plain, "--map", path)
    assert (answer.code, "nothing is called 'gone'" in answer.err) == (2, True)
    for bad in ("[1]", '{"a": 1}', "{", '{"first": "\\ud800"}'):
        path.write_text(bad)
        assert ckpt("rename", plain, "--map", path).code == 2
    assert load_file(plain).keys() == wanted


def test_a_shorter_name_is_a_change_of_the_header_alone(ckpt: Ckpt, plain: Path) -> None:
    before, inode = plain.read_bytes(), plain.stat().st_ino
    dry = report(ckpt("rename", plain, "--strip", "module", "--json", "-n"))
    assert plain.read_bytes() == before
    done = report(ckpt("rename", plain, "--strip", "module", "--json"))
    assert (plain.stat().st_ino, plain.stat().st_size) == (inode, len(before))
    assert done["bytes_written"] == dry["bytes_written"]
    assert done["patched"] is True
    begin = 8 + int.from_bytes(before[:8], "little")
    assert plain.read_bytes()[begin:] == before[begin:]


def test_a_header_that_does_not_fit_is_written_with_room_for_the_next_edit(ckpt: Ckpt, plain: Path) -> None:
    size = plain.stat().st_size
    dry = report(ckpt("rename", plain, "--add", "a.long.prefix", "--json", "-n"))
    done = report(ckpt("rename", plain, "--add", "a.long.prefix", "--json"))
    assert done["patched"] is False
    assert plain.stat().st_size == done["bytes_written"] == dry["bytes_written"]
    assert plain.stat().st_size > size
    inode = plain.stat().st_ino
    assert report(ckpt("rename", plain, "--add", "another", "--json"))["patched"] is True
    assert plain.stat().st_ino == inode
    assert_holds(plain, {f"another.a.long.prefix.{name}": tensor for name, tensor in state().items()})


def test_the_order_of_the_header_and_fields_that_mean_nothing_are_kept(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "odd.safetensors"
    fields = {
        "late": {"dtype": "U8", "shape": [2], "data_offsets": [4, 6], "note": {"by": ["me", None, 1.5]}},
        "__metadata__": {"k": "v"},
        "early": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
    }
    raw = json.dumps(fields).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(range(6)))
    assert ckpt("rename", path, "late", "a.name.that.is.so.long.that.it.does.not.fit.at.all").code == 0
    assert ckpt("rm", path, "early", "-o", tmp_path / "less.safetensors").code == 0
    found = header(path)
    assert [name for name in found if name != "__metadata__"] == [
        "a.name.that.is.so.long.that.it.does.not.fit.at.all", "early",
    ]  # fmt: skip
    assert found["a.name.that.is.so.long.that.it.does.not.fit.at.all"]["note"] == fields["late"]["note"]  # type: ignore[index]
    assert load_file(path)["early"].tolist() == [0, 1, 2, 3]
    less = load_file(tmp_path / "less.safetensors")
    assert [tensor.tolist() for tensor in less.values()] == [[4, 5]]


def test_a_cast_puts_wider_elements_first_as_the_library_does(tmp_path: Path, ckpt: Ckpt, plain: Path) -> None:
    dry = report(ckpt("cast", plain, "bf16", "module", "--json", "-n"))
    done = report(ckpt("cast", plain, "bf16", "module", "--json"))
    assert sorted(done["changed"]) == ["module.a.weight", "module.b.weight"]  # type: ignore[call-overload]
    assert done["bytes_written"] == dry["bytes_written"] == plain.stat().st_size
    wanted = {
        name: tensor.bfloat16() if name.startswith("module.") and tensor.is_floating_point() else tensor
        for name, tensor in state().items()
    }
    assert_holds(plain, wanted)
    starts = {name: info["data_offsets"][0] for name, info in header(plain).items() if name != "__metadata__"}  # type: ignore[index]
    for name, tensor in wanted.items():
        assert starts[name] % tensor.element_size() == 0
    assert (8 + int.from_bytes(plain.read_bytes()[:8], "little")) % 64 == 0


def test_a_cast_that_loses_values_is_refused_and_counted(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.tensor([1e30, 1e-30, 1.0, float("inf")])}, path)
    before = path.read_bytes()
    answer = ckpt("cast", path, "float16")
    assert answer.code == 2
    assert "1 value would become infinite, 1 value would become zero" in answer.err
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert ckpt("cast", path, "float16", "--lossy").code == 0
    assert load_file(path)["a"].tolist() == [float("inf"), 0.0, 1.0, float("inf")]
    for arguments in (["complex64"], ["int8"], ["nonsense"]):
        assert ckpt("cast", path, *arguments).code == 2
    assert ckpt("cast", path, "float16").code == 2  # it is of that dtype already


# --- ties ------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A model whose head is its embedding, and a copy of it besides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(4, 3)
        self.head, self.tail = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
        self.head.weight = self.tail.weight = self.emb.weight


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """What `save_model` makes of it: one tensor, and two aliases in the metadata."""
    path = tmp_path / "tied.safetensors"
    save_model(Tied(), str(path), metadata={"kept": "note"})
    return path


def names_of(path: Path) -> tuple[str, list[str]]:
    """The one name that is stored, and those that are aliases of it."""
    (kept,) = load_file(path)
    aliases = [name for name, value in metadata(path).items() if value == kept]
    return kept, aliases


def test_aliases_follow_when_their_names_or_that_of_their_tensor_change(ckpt: Ckpt, tied: Path) -> None:
    assert ckpt("rename", tied, "--add", "m").code == 0
    kept, aliases = names_of(tied)
    assert sorted([kept, *aliases]) == ["m.emb.weight", "m.head.weight", "m.tail.weight"]
    assert metadata(tied)["kept"] == "note"
    assert ckpt("rename", tied, "--strip", "m").code == 0
    load_model(Tied(), str(tied))  # which raises where a name is missing
    assert ckpt("ties", tied, "emb.weight", "tail.weight").code == 0


def test_removing_the_name_that_is_stored_keeps_its_bytes_under_an_alias(ckpt: Ckpt, tied: Path) -> None:
    kept, aliases = names_of(tied)
    value = load_file(tied)[kept]
    assert ckpt("rm", tied, kept).code == 0
    now, rest = names_of(tied)
    assert {now, *rest} == set(aliases)
    assert torch.equal(load_file(tied)[now], value)
    assert ckpt("rm", tied, rest[0]).code == 0
    assert metadata(tied) == {"kept": "note"}
    assert names_of(tied) == (now, [])


@pytest.mark.parametrize("which", ["stored", "alias"])
def test_untie_writes_a_tensor_of_its_own(ckpt: Ckpt, tied: Path, which: str) -> None:
    kept, aliases = names_of(tied)
    value = load_file(tied)[kept]
    name = kept if which == "stored" else aliases[0]
    assert ckpt("untie", tied, name).code == 0
    found = load_file(tied)
    assert name in found
    assert len(found) == 2
    assert all(torch.equal(tensor, value) for tensor in found.values())
    assert len([v for k, v in metadata(tied).items() if k != "kept"]) == 1
    assert ckpt("ties", tied, name, next(other for other in (kept, *aliases) if other != name)).code == 1
    assert ckpt("untie", tied, name).code == 2


def test_tie_stores_equal_tensors_once_and_refuses_others(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.safetensors"
    one = torch.randn(4)
    save_file({"a": one, "b": one.clone(), "c": torch.zeros(4), "d": torch.zeros(2)}, path, metadata={"note": "a"})
    # the note's value is a tensor's name and its key is none: that is how an alias is recorded, so it is one
    assert ckpt("tie", path, "a", "b").code == 0
    assert load_file(path).keys() == {"a", "c", "d"}
    assert metadata(path) == {"note": "a", "b": "a"}
    for arguments, told in (
        (["a", "c"], "different values"),
        (["a", "d"], "cannot be one tensor"),
        (["a"], "takes two names"),
        (["a", "b"], "tied already"),
        (["a", "x"], "nothing is called 'x'"),
    ):
        answer = ckpt("tie", path, *arguments)
        assert (answer.code, told in answer.err) == (2, True), answer.err
    assert ckpt("tie", path, "a", "c", "--force").code == 0
    assert ckpt("show", path, "c").out == ckpt("show", path, "a").out


def test_no_name_may_become_what_the_metadata_would_make_an_alias_of(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, path, metadata={"author": "me", "b.note": "x"})
    before = path.read_bytes()
    answer = ckpt("rename", path, "a", "me")
    assert (answer.code, "would then tell of a tie" in answer.err) == (2, True)
    assert ckpt("meta", path, "author=b").code == 2
    assert path.read_bytes() == before
    assert ckpt("rename", path, "b", "b.note").code == 0  # a tensor may be called as a string is
    answer = ckpt("tie", path, "a", "b.note")
    assert (answer.code, "has a string 'b.note'" in answer.err) == (2, True)


# --- metadata --------------------------------------------------------------------------------------------------------


def test_meta_shows_sets_and_removes_strings_in_the_header_alone(ckpt: Ckpt, plain: Path) -> None:
    assert sorted(ckpt("meta", plain).lines) == ["a\tfirst", "format\tpt", "z\tlast"]
    assert ckpt("meta", plain, "z").lines == ["z\tlast"]
    assert json.loads(ckpt("meta", plain, "--json", "z", "a").out) == {"z": "last", "a": "first"}
    size, inode = plain.stat().st_size, plain.stat().st_ino
    assert report(ckpt("meta", plain, "z=2", "-d", "a", "--json"))["changed"] == ["z", "a"]
    assert (plain.stat().st_size, plain.stat().st_ino) == (size, inode)
    assert metadata(plain) == {"format": "pt", "z": "2"}
    assert ckpt("meta", plain, "note=" + "x" * 500).code == 0
    assert metadata(plain) == {"format": "pt", "z": "2", "note": "x" * 500}
    assert_holds(plain, state())
    for arguments in (["gone"], ["-d", "gone"], ["=x"], ["z=1", "y"], ["other.half=x"], ["k=\udcff"]):
        assert ckpt("meta", plain, *arguments).code == 2
    assert ckpt("meta", plain, "-d", "format", "-d", "z", "-d", "note").code == 0
    assert metadata(plain) == {}


def test_meta_is_for_containers_that_have_a_string_map(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(1)}, path)
    answer = ckpt("meta", path, "k=v")
    assert answer.code == 2
    assert "hint: ckpt set" in answer.err


# --- what is refused -------------------------------------------------------------------------------------------------


REFUSED = [
    (["rename", "F", "module.a.weight", "module.b.weight"], "would both be called"),
    (["rename", "F", "nothing", "x"], "nothing is called 'nothing'"),
    (["rename", "F", "--strip", "nothing"], "no name would change by '--strip nothing'"),
    (["rename", "F", "--strip", "nothing", "--add", "x"], "no name would change by '--strip nothing'"),
    (["rename", "F", "--sub", "nothing", "x"], "no name would change"),
    (["rename", "F", "--sub", "(", "x"], "is no substitution"),
    (["rename", "F", "--sub", ".*", ""], "which is no name"),
    (["rename", "F", "--sub", r"(\w+)\.\w+$", "same"], "would both be called"),
    (["rename", "F", "module.a.weight"], "a name is renamed to another"),
    (["rename", "F"], "say what to rename"),
    (["rename", "F", "other.half", "\udcff"], "which is no name"),
    (["rm", "F", "nothing"], "nothing is called"),
    (["rm", "F", "other.half[0]"], "is a part of a tensor"),
    (["rm", "F", "*"], "nothing would be left"),
    (["rm", "F", "other.*", "nothing*"], "nothing is called 'nothing*'"),
    (["keep", "F", "nothing"], "nothing is called"),
    (["keep", "F", "--root", "nothing"], "nothing is called"),
    (["keep", "F"], "keep takes names"),
    (["cast", "F", "bf16", "other.flag"], "is of bool"),
    (["cast", "F", "bf16", "nothing"], "nothing is called"),
    (["cast", "F", "float64x"], "no floating dtype"),
    (["untie", "F", "other.half"], "shares its bytes with no other name"),
    (["compact", "F"], "no storage is larger"),
    (["set", "F", "--new", "epoch=1"], "holds tensors and strings only"),
    (["rename", "F", "other", "x", "-o", "F"], "the output is the file itself"),
    (["rename", "F", "other", "x", "-o", "OUT", "--backup"], "--backup is for edits in place"),
]


@pytest.mark.parametrize(("arguments", "told"), REFUSED, ids=[" ".join(case[0]) for case in REFUSED])
def test_what_cannot_be_done_is_refused_in_one_line(ckpt: Ckpt, plain: Path, arguments: list[str], told: str) -> None:
    before = plain.read_bytes()
    paths = {"F": str(plain), "OUT": str(plain.with_name("out"))}
    for dry in ([], ["-n"]):
        answer = ckpt(*[paths.get(argument, argument) for argument in arguments], *dry)
        assert answer.code == 2
        assert told in answer.err, answer.err
        assert len(answer.err.splitlines()) <= 2
    assert plain.read_bytes() == before
    assert [path.name for path in plain.parent.iterdir()] == [plain.name]
