"""What configurations beside weights make a library import, call or render is found, and ordinary ones are quiet."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from builders import st
from builders.pt import Record, archive
from scanning import HARMFUL, codes, scanned

from ckpt_cli.ops.scan import Scan, scan


def keras(path: Path, **layer: Any) -> Scan:
    config = json.dumps({"class_name": "Functional", "config": {"layers": [layer]}}).encode()
    return scanned(path / "m.keras", archive([Record("metadata.json", b"{}"), Record("config.json", config)]))


def beside(path: Path, name: str, content: bytes | str) -> Scan:
    """A scan of a folder that has a file beside its weights."""
    folder = path / "folder"
    folder.mkdir()
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    st.write(folder / "model.safetensors", {"w": st.info("U8", [1], 0, 1)}, b"\0")
    return scan(str(folder))


@pytest.mark.parametrize(
    "layer",
    [
        {"class_name": "function", "module": "builtins", "config": "exec", "registered_name": "function"},
        {"class_name": "exec", "module": "builtins", "config": {"x": 1}},
        {"class_name": "function", "module": None, "registered_name": "builtins>eval"},
        {"class_name": "function", "module": "keras.utils", "config": "get_file"},
        {"class_name": "get_file", "module": "keras.utils", "config": {"origin": "http://x"}},
        {"class_name": "function", "module": "keras.config", "config": "enable_unsafe_deserialization"},
        {"class_name": "TFSMLayer", "module": "keras.layers", "config": {"filepath": "/tmp/x"}},
        {"config": "load", "module": "numpy", "class_name": "function"},
        {"module": "numpy", "class_name": "function", "config": "load"},
    ],
)
def test_a_function_that_keras_would_take_is_judged(tmp_path: Path, layer: dict[str, Any]) -> None:
    assert codes(keras(tmp_path, **layer), "error") == {"keras-import"}


def test_a_vocabulary_that_is_a_path_is_read_by_keras(tmp_path: Path) -> None:
    layer = {"class_name": "StringLookup", "module": "keras.layers", "config": {"vocabulary": "/etc/passwd"}}
    assert codes(keras(tmp_path, **layer)) == {"keras-file"}
    words = layer | {"config": {"vocabulary": ["a/b", "c"]}}
    assert keras(tmp_path, **words).findings == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize(
    ("config", "code"),
    [
        ('{"class_name": "Lambda", "config": {}}', "keras-lambda"),
        ('{"class_name": "function", "module": "os", "config": "system"}', "keras-import"),
    ],
)
def test_hdf5_hides_no_configuration_in_a_wide_encoding(tmp_path: Path, encoding: str, config: str, code: str) -> None:
    content = b"\x89HDF\r\n\x1a\n" + bytes(50) + config.encode(encoding) + bytes(50)
    assert codes(scanned(tmp_path / "m.h5", content)) == {code}


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{% endfor %}",
    "{{ lipsum|attr('\\x5f\\x5fglobals\\x5f\\x5f') }}",
    "{{ cycler.__init__ }}",
    "{{ x['_' ~ '_class_' ~ '_'] }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_that_reaches_for_python_is_found(tmp_path: Path, template: str) -> None:
    for number, (name, content) in enumerate(
        {
            "tokenizer_config.json": json.dumps({"chat_template": template}),
            "processor_config.json": json.dumps({"chat_template": [{"name": "default", "template": template}]}),
            "chat_template.jinja": template,
            "m.gguf": b"GGUF\3\0\0\0" + bytes(16) + b"tokenizer.chat_template" + template.encode() + bytes(100),
        }.items()
    ):
        (tmp_path / str(number)).mkdir()
        assert codes(beside(tmp_path / str(number), name, content), "error") == {"template"}, name


CHAT = (
    "{% set ns = namespace(first=true) %}{% for message in messages %}{% if loop.first and message.role != 'system'"
    " %}{{ '<|im_start|>system\\nYou are __helpful__.<|im_end|>\\n' }}{% endif %}{{ message.content | trim }}"
    "{{ raise_exception('roles') }}{{ tool | tojson(indent=4) }}{{ strftime_now('%d') }}{% endfor %}"
)


def test_ordinary_files_beside_weights_are_quiet(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "template": "x"}
    vocab = {f"token{n}": n for n in range(2000)} | {"a" * 64: 2000, "ĠĠĠĠ" * 16: 2001, "_" * 80: 2002}
    hydra = "model:\n  _target_: lab.models.Net\n  optimizer:\n    _target_: torch.optim.AdamW\n"
    hparams = "a: !!python/tuple [1, 2]\nb: !!python/object:argparse.Namespace {lr: 1}\n"
    readme = (
        "# Model\nSee `https://example.org/a/very/long/address/of/a/page/that/has/no/end/at/all/0123456789`.\n" * 50
    )
    hashes = "".join(f"{n:064x}  file{n}\n" for n in range(100))
    for number, (name, content) in enumerate(
        {
            "config.json": json.dumps(config),
            "tokenizer_config.json": json.dumps({"chat_template": CHAT}),
            "chat_template.jinja": CHAT,
            "tokenizer.json": json.dumps({"model": {"vocab": vocab}}),
            "config.yaml": hydra,
            "hparams.yaml": hparams,
            "README.md": readme,
            "SHA256SUMS": hashes,
        }.items()
    ):
        (tmp_path / str(number)).mkdir()
        assert beside(tmp_path / str(number), name, content).findings == [], name


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("c.yaml", "a: !!python/object/apply:os.system ['id']\n", "yaml-python"),
        ("c.yaml", "a: !<tag:yaml.org,2002:python/object/new:subprocess.Popen> [id]\n", "yaml-python"),
        ("c.yaml", "a: !!python/module:os\n", "yaml-python"),
        ("c.yaml", "model:\n  _target_: os.system\n  command: id\n", "config-call"),
        ("c.yaml", "model: {\"_target_\": 'builtins.exec', x: 1}\n", "config-call"),
        ("c.yaml", "? _target_\n: os.system\n", "config-call"),
        ("c.yaml", "_target_:\n  os.system\n", "config-call"),
        ("c.yaml", "a: !!python/object/apply%3Aos.system [id]\n", "yaml-python"),
        ("c.yaml", "a: !!python/object/apply:os.system [id]\n".encode("utf-16"), "yaml-python"),
        ("c.toml", '_target_ = "os.system"\n', "config-call"),
        ("c.json", '{"model":{"_target_":"os.system"}}', "config-call"),
        ("c.json", '{"model":{"\\u005ftarget_":"os.system"}}', "config-call"),
        ("model_index.json", '{"_class_name": "Pipeline", "unet": ["os", "system"]}', "config-call"),
    ],
)
def test_what_a_loader_of_yaml_or_hydra_would_call_is_judged(
    tmp_path: Path, name: str, content: str | bytes, code: str
) -> None:
    assert codes(beside(tmp_path, name, content), "error") == {code}


@pytest.mark.parametrize(
    "schema",
    [
        '{"__class__": "system", "__module__": "os", "__loader__": "FunctionNode"}',
        '{"__class__": "eval", "content": {"__class__": "dict", "__module__": "builtins"}, "__module__": "builtins"}',
        '{"__module__": "builtins", "a": {"__module__": "x", "__class__": "y"}, "__class__": "exec"}',
    ],
)
def test_what_skops_would_import_is_judged(tmp_path: Path, schema: str) -> None:
    found = scanned(tmp_path / "m.skops", archive([Record("schema.json", schema.encode())]))
    assert codes(found, "error") == {"skops-import"}


def test_a_sound_file_of_skops_is_quiet(tmp_path: Path) -> None:
    nodes = [("dict", "builtins"), ("LogisticRegression", "sklearn.linear_model._logistic"), ("function", "builtins")]
    schema = json.dumps([{"__class__": name, "__module__": module, "__loader__": "x"} for name, module in nodes])
    assert scanned(tmp_path / "m.skops", archive([Record("schema.json", schema.encode())])).findings == []


def test_code_of_repositories_is_reported(tmp_path: Path) -> None:
    own = beside(tmp_path, "config.json", '{"auto_map": {"AutoModel": "modeling.Model"}, "trust_remote_code": true}')
    assert [finding.severity for finding in own.findings] == ["note", "note"]
    (tmp_path / "other").mkdir()
    other = beside(tmp_path / "other", "config.json", '{"auto_map": {"AutoModel": "evil/repo--modeling.Model"}}')
    assert codes(other) == {"remote-code"}
    hidden = b'{"auto_map": {"a": "b", "class_name": "Lambda"}}'
    assert "keras-lambda" in codes(scanned(tmp_path / "m.keras", archive([Record("config.json", hidden)])))


ENCODED = {
    "base64": base64.b64encode(HARMFUL),
    "base64 of zlib": base64.b64encode(zlib.compress(HARMFUL)),
    "base85": base64.b85encode(HARMFUL),
    "hex": HARMFUL.hex().encode(),
}


@pytest.mark.parametrize("how", ENCODED)
@pytest.mark.parametrize(
    ("name", "around"),
    [
        ("config.yaml", b"a: 1\nweights: %s\n"),
        ("notes.txt", b"hello there\nsee %s here\n"),
        ("README.md", b"# Weights\nDecode `%s` to get them.\n"),
        ("table.csv", b"a,b\n1,%s\n"),
        ("config.json", b'{"a": {"x": "%s"}}'),
        ("model.xml", b"<a>%s</a>\n"),
    ],
)
def test_text_of_a_folder_that_decodes_to_a_pickle_is_found(tmp_path: Path, how: str, name: str, around: bytes) -> None:
    if (how, name) != ("base85", "model.xml"):  # where the digits begin within `<a>` is not known
        assert "dangerous-global" in codes(beside(tmp_path, name, around % ENCODED[how]))


@pytest.mark.parametrize("how", ENCODED)
def test_metadata_of_safetensors_that_decode_to_a_pickle_are_found(tmp_path: Path, how: str) -> None:
    header = {"__metadata__": {"x": ENCODED[how].decode()}, "w": st.info("U8", [1], 0, 1)}
    assert "dangerous-global" in codes(scanned(tmp_path / "m.safetensors", st.file(header, b"\0")))


def test_a_directive_that_renames_tags_is_reported(tmp_path: Path) -> None:
    text = "%TAG !p! tag:yaml.org,2002:python/\n---\na: !p!object/apply:os.system [id]\n"
    assert codes(beside(tmp_path, "c.yaml", text)) == {"yaml-python"}


def test_a_folder_of_two_clean_checkpoints_is_clean(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        st.write(tmp_path / name, {"w": st.info("U8", [1], 0, 1)}, b"\0")
    assert (scan(str(tmp_path)).ok, scan(str(tmp_path)).findings) == (True, [])
