"""What configurations name for a library to import, call or render: Keras, Hydra, YAML, skops, chat templates.

Sources: keras/src/saving/serialization_lib.py (`_retrieve_class_or_fn`), hydra/_internal/instantiate/_instantiate2.py,
PyYAML's constructor.py (`python/…` tags), skops/io/_utils.py (`gettype`), jinja2, and transformers'
dynamic_module_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain, islice

from ckpt_cli.scanner.judge import Judgement, judge
from ckpt_cli.scanner.streams import Oddity

_PAIRED = 1_000
"""Names without a module, or modules without a name, that are remembered of one document."""

TEMPLATES = (".jinja", ".jinja2", ".j2")
"""Suffixes of templates."""


# --- Keras ------------------------------------------------------------------------------------------------------------

_BUILTINS = frozenset(
    b"exec eval open compile __import__ getattr setattr delattr globals locals vars input breakpoint".split()
)
_OF_KERAS = {
    b"get_file": "fetches a file from anywhere",
    b"extract_archive": "writes the files of an archive",
    b"enable_unsafe_deserialization": "lets Keras run the code of Lambda layers",
    b"load_model": "loads another file",
    b"load_weights": "loads another file",
    b"func_load": "makes a function of bytecode",
    b"TFSMLayer": "loads another model, with its code",
}
"""Functions and classes of Keras that no configuration of a model names, and what they do."""

_MODULE = re.compile(r"\w[\w.]{0,200}")
_QUIET = frozenset(["keras", "tensorflow", "tf_keras", "builtins"])
_MODULES = 50
"""Modules of one document that are judged with each of its names."""


class Functions:
    """The classes and functions that one document of Keras names, and the modules that it would import for them.

    Which name belongs to which module is not asked: a document may have them in any order, and several times.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._modules: set[str] = set()

    def name(self, value: bytes, where: str) -> Iterator[Oddity]:
        """A class or function, such as Keras would take from its own modules or from those of Python."""
        name = value.rpartition(b">")[2].rpartition(b".")[2]
        said = name.decode("utf-8", "replace")
        if name in _BUILTINS:
            yield Oddity("error", "keras-import", where, f"the function {said} of Python, which is not part of a model")
        elif name in _OF_KERAS:
            yield Oddity("error", "keras-import", where, f"{said} of Keras, which {_OF_KERAS[name]}")
        elif said not in self._names and len(self._names) < _PAIRED and said.isidentifier():
            self._names.add(said)
            for module in self._modules:
                yield from _imported(module, said, where)

    def module(self, value: bytes, where: str) -> Iterator[Oddity]:
        """A module; `builtins` stands there for what has no module."""
        module = value.decode("utf-8", "replace")
        if not _MODULE.fullmatch(module) or module.partition(".")[0] in _QUIET or module in self._modules:
            return
        judgement = judge(module, "_")
        if judgement.verdict == "dangerous":
            yield Oddity("error", "keras-import", where, f"a class or function of {module}: {judgement.reason}")
        elif len(self._modules) < _MODULES:
            self._modules.add(module)
            for name in sorted(self._names):
                yield from _imported(module, name, where)


def _imported(module: str, name: str, where: str) -> Iterator[Oddity]:
    judgement = judge(module, name)
    if judgement.verdict == "dangerous":
        yield Oddity("error", "keras-import", where, f"Keras would take {module}.{name}: {judgement.reason}")


def vocabulary(value: bytes, where: str) -> Iterator[Oddity]:
    """A vocabulary that is a path: the layer reads that file, or fetches it, when it is made."""
    if b"/" in value or b"\\" in value:
        said = value[:200].decode("utf-8", "replace")
        yield Oddity("warning", "keras-file", where, f"a vocabulary that Keras reads from a file: {said}")


# --- names of Python --------------------------------------------------------------------------------------------------

_NAME = re.compile(r"\w[\w.]{0,400}")


def _judged(name: str) -> Judgement | None:
    if not _NAME.fullmatch(name) or "." not in name:
        return None
    module, _, attribute = name.rpartition(".")
    return judge(module, attribute)


def target(value: bytes, where: str, loader: str = "Hydra") -> Iterator[Oddity]:
    """What Hydra would call, in `_target_`, or another loader of configurations."""
    name = value.decode("utf-8", "replace").strip()
    judgement = _judged(name)
    if judgement is not None and judgement.verdict == "dangerous":
        yield Oddity("error", "config-call", where, f"{loader} would call {name}: {judgement.reason}")


_LOADER = "a loader of configurations"


def class_path(value: bytes, where: str) -> Iterator[Oddity]:
    """What LightningCLI, latent diffusion or sentence-transformers would import and call."""
    yield from target(value, where, _LOADER)


def class_of_module(value: bytes, where: str) -> Iterator[Oddity]:
    """A class that sentence-transformers imports, in its list of modules."""
    if where.endswith("modules.json"):
        yield from class_path(value, where)


def module(value: bytes, where: str) -> Iterator[Oddity]:
    """A module that PEFT or MLflow would import."""
    name = value.decode("utf-8", "replace").strip()
    judgement = judge(name, "_") if _NAME.fullmatch(name) else None
    if judgement is not None and judgement.verdict == "dangerous":
        yield Oddity("error", "config-call", where, f"{_LOADER} would import {name}: {judgement.reason}")


def parts_of_pipeline(text: bytes, where: str) -> Iterator[Oddity]:
    """The modules and classes that a pipeline of diffusers is made of."""
    for match in islice(_PAIR.finditer(text), _PAIRED):
        name = f"{match[1].decode()}.{match[2].decode()}"
        judgement = _judged(name)
        if judgement is not None and judgement.verdict == "dangerous":
            yield Oddity("error", "config-call", where, f"diffusers would take {name}: {judgement.reason}")


class Pairs:
    """The classes and modules that skops has in pairs, in either order, and with other pairs between them."""

    def __init__(self) -> None:
        self._names: list[bytes] = []
        self._modules: list[bytes] = []

    def add(self, key: bytes, value: bytes, where: str) -> Iterator[Oddity]:
        """Note one part of a pair; yields what is wrong with a whole one."""
        mine, other = (self._names, self._modules) if key == b"__class__" else (self._modules, self._names)
        if not other:
            mine.append(value)
            del mine[:-_PAIRED]
            return
        name, module = (value, other.pop()) if key == b"__class__" else (other.pop(), value)
        full = f"{module.decode('utf-8', 'replace')}.{name.decode('utf-8', 'replace')}"
        judgement = _judged(full)
        if judgement is not None and judgement.verdict == "dangerous" and full not in _OF_SKOPS:
            yield Oddity("error", "skops-import", where, f"skops would take {full}: {judgement.reason}")


_OF_SKOPS = frozenset(["builtins.function", "builtins.builtin_function_or_method", "builtins.method"])
"""What skops calls the types of functions."""

_TAG = re.compile(rb"(?:!!|!<tag:yaml\.org,2002:)python/(object/apply|object/new|object|name|module):([\w.]{1,400})")
_TAG_DIRECTIVE = re.compile(rb"^%TAG[ \t]+\S{1,64}[ \t]+\S{0,64}yaml\.org", re.MULTILINE)
_TARGET = re.compile(rb"""["']?_target_["']?\s{0,64}[:=]\s{0,64}["']?([\w.]{1,400})""")
_CLASS_PATH = re.compile(
    rb"""\b(?:target|class_path)["']?[ \t]{0,64}:[ \t]{0,64}["']?(\w[\w.]{0,400})["']?[ \t]*(?:[\r\n,}#]|$)"""
)
_LOADED_BY = re.compile(rb"""\bloader_module["']?[ \t]{0,64}:[ \t]{0,64}["']?(\w[\w.]{0,400})""")
_ELSEWHERE = re.compile(rb"""_target_["']?\s{0,64}[:=]\s{0,64}["']?(?:\*|\$\{)""")
_VALUE = re.compile(rb"""[:=][ \t]{0,64}(?:&\S{1,64}[ \t]{1,64})?["']?([A-Za-z_]\w{0,99}(?:\.\w{1,99}){1,20})""")
_RESOLVER = re.compile(
    rb"\$\{\s{0,64}(?:eval|python|py|exec|code|lambda)\s{0,64}:[^\n]{0,400}?"
    rb"(?:__|\b(?:import|exec|eval|open|compile|getattr|os|subprocess)\b)"
)
_CODED = re.compile(rb"\\(?:x|u00)([0-7][0-9a-fA-F])")
_PERCENT = re.compile(rb"%([0-9a-fA-F]{2})")
_PAIR = re.compile(rb'\[\s{0,64}"([\w.]{1,200})"\s{0,64},\s{0,64}"(\w{1,200})"\s{0,64}\]')
_SEVERITY = {"dangerous": "error", "unusual": "warning", "unknown": "note"}
_SHOWN = 100


def text_findings(text: bytes, where: str) -> Iterator[Oddity]:
    """What a text makes a loader of YAML call, and a template of jinja."""
    if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = text.decode("utf-16", "replace").encode()
    if _TAG_DIRECTIVE.search(text):
        yield Oddity("warning", "yaml-python", where, "a directive that gives tags of YAML another name")
    if b"python/" in text and b"%" in text:
        text = _PERCENT.sub(lambda match: bytes((int(match[1], 16),)), text)
    if b"\\x" in text or b"\\u00" in text:
        text = _CODED.sub(lambda match: bytes((int(match[1], 16),)), text)
    if match := _RESOLVER.search(text):
        said = match[0][:80].decode("utf-8", "replace")
        yield Oddity("warning", "config-call", where, f"a resolver of OmegaConf that evaluates Python: {said}")
    yield from islice(chain(_tags(text, where), _calls(text, where)), _SHOWN)
    if where.endswith(TEMPLATES):
        yield from template(text, where)


def _tags(text: bytes, where: str) -> Iterator[Oddity]:
    """What the tags of YAML that name Python would take."""
    for match in _TAG.finditer(text):
        name = match[2].decode()
        judgement = judge(name, "_") if match[1] == b"module" else _judged(name) or judge("builtins", name)
        if judgement.verdict in _SEVERITY:
            message = f"yaml.unsafe_load would take {name}: {judgement.reason}"
            yield Oddity(_SEVERITY[judgement.verdict], "yaml-python", where, message)


def _calls(text: bytes, where: str) -> Iterator[Oddity]:
    """What loaders of YAML would call by some keys; where an alias or a reference stands there, any value may be it."""
    for match in _TARGET.finditer(text):
        yield from target(match[1], where)
    for match in _CLASS_PATH.finditer(text):
        yield from class_path(match[1], where)
    for match in _LOADED_BY.finditer(text):
        yield from module(match[1], where)
    if _ELSEWHERE.search(text):
        for match in islice(_VALUE.finditer(text), _PAIRED):
            yield from target(match[1], where)


# --- templates and code of repositories -------------------------------------------------------------------------------

_ESCAPE = re.compile(
    rb"(?:__|\\x5f\\x5f|\\u005f\\u005f)"
    rb"(?:class|mro|bases?|globals|builtins|subclasses|init|import|dict|getattribute|code|reduce)"
    rb"""|\|\s{0,64}attr\b|["']_{1,2}["']\s{0,64}[~+]"""
    rb"|\b_TemplateReference|\bcycler\s{0,9}\.|\blipsum\b|\bget_flashed_messages\b"
)
"""Signs of a template that reaches from a value to Python's modules; jinja's sandbox refuses these, others do not."""


def template(value: bytes, where: str) -> Iterator[Oddity]:
    """A template, such as of a chat, that goes for what is behind its values."""
    match = _ESCAPE.search(value) if b"{" in value else None
    if match:
        said = match[0][:40].decode("utf-8", "replace")
        yield Oddity("error", "template", where, f"a template that reaches for Python itself ({said})")


def template_in(data: memoryview, where: str) -> Iterator[Oddity]:
    """The chat template of a GGUF file, whose header begins the file."""
    at = bytes(data[: 32 << 20]).find(b"tokenizer.chat_template")
    if at >= 0:
        yield from template(bytes(data[at : at + (1 << 20)]), where)


def implementation(value: bytes, where: str) -> Iterator[Oddity]:
    """The class of a pipeline, where it is taken from another repository."""
    if b"--" in value:
        yield from code_of_repository(value, where)


def code_of_repository(value: bytes, where: str) -> Iterator[Oddity]:
    """A class that transformers takes from Python files of a repository, where it may trust them."""
    name = value[:200].decode("utf-8", "replace")
    repository, dashes, _ = name.partition("--")
    if dashes:
        message = f"auto_map names code of another repository, {repository}, which trust_remote_code runs"
        yield Oddity("warning", "remote-code", where, message)
    elif "." in name:
        message = f"auto_map names {name}, code beside it, which trust_remote_code runs"
        yield Oddity("note", "remote-code", where, message)
