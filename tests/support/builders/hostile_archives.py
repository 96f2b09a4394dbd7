"""TorchScript archives and exported programs made to harm whoever opens them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from builders.hostile_zips import zeros_deflated
from builders.pickles import built, call, new, pickled, tensor
from builders.pt import DEFLATED, Record, archive, torch_records

Case = tuple[str, Callable[[], bytes], str | None]

_OBJECT = built(new("__torch__.M"), {"w": tensor("0", (4,))})
_CONFIG = "m/data/weights/model_weights_config.json"
_NO_CONSTANTS = Record("m/data/constants/model_constants_config.json", b'{"config":{}}')


def _script(*code: bytes, root: Any = _OBJECT, constants: Any = (), **fields: Any) -> Callable[[], bytes]:
    """A TorchScript archive of one class, whose code is made of these pieces."""

    def build() -> bytes:
        records = torch_records(root, {"0": bytes(16)}, layout=False)
        records.append(Record("archive/constants.pkl", pickled(constants)))
        records.append(Record("archive/code/__torch__.py", b"".join(code), method=DEFLATED, **fields))
        return archive(records)

    return build


def _program(config: Callable[[], bytes], *more: Record, **fields: Any) -> Callable[[], bytes]:
    """An exported program with one map of weights."""

    def build() -> bytes:
        records = [
            Record("m/archive_format", b"pt2"),
            Record("m/data/weights/w", bytes(16)),
            Record(_CONFIG, config(), method=DEFLATED, **fields),
            *more,
        ]
        return archive(records)

    return build


def _classes() -> bytes:
    return b"".join(b'class c%d(M):\n  __buffers__ = ["w%d"]\n' % (n, n) for n in range(400_000))


def _declared() -> bytes:
    return b"class M(Module):\n  __buffers__ = [" + b"".join(b'"%d",' % n for n in range(1_500_000)) + b"]\n"


def _wrapped(times: int) -> Any:
    node: Any = [1]
    for _ in range(times):
        node = call("torch.jit._pickle.restore_type_tag", node, "List[int]")
    return built(new("__torch__.M"), {"x": node})


def _payloads(meta: bytes) -> bytes:
    each = b'"%d":{"path_name":"w","tensor_meta":{"dtype":7,' + meta + b"}},"
    return b'{"config":{' + b"".join(each % n for n in range(90_000)) + b'"z":5}}'


def _buffers() -> bytes:
    return b"".join(b'"buffer_name": "%d"' % n for n in range(1_800_000))


ARCHIVES: list[Case] = [
    ("script_of_400_000_classes", lambda: _script(_classes())(), None),
    ("script_of_1_500_000_buffers", lambda: _script(_declared())(), None),
    ("script_code_bomb", _script(data=zeros_deflated(3 << 10), nbytes=3 << 30), None),
    ("script_code_that_lies", _script(data=zeros_deflated(3 << 10), nbytes=1000), None),
    ("script_code_that_ends_early", _script(b"class", nbytes=1000), "inflates to 5 bytes only"),
    ("script_code_of_brackets", _script(b"class M(Module):\n  __buffers__ = [" + b'"' * (8 << 20)), None),
    ("script_wrapped_300_times", lambda: _script(root=_wrapped(300))(), None),
    ("script_constants_that_run", _script(constants=call("os.system", "touch canary")), None),
    ("program_map_bomb", _program(bytes, data=zeros_deflated(3 << 10), nbytes=3 << 30), "far more than it needs"),
    ("program_map_of_lists", _program(lambda: b"[" + b"[]," * (10 << 20) + b"0]"), "of memory"),
    ("program_map_of_objects", _program(lambda: b"[" + b"{}," * (10 << 20) + b"0]"), "of memory"),
    ("program_map_that_nests", _program(lambda: b"[" * (2 << 20)), "nests too deeply"),
    ("program_of_90_000_names", _program(lambda: _payloads(b'"sizes":[1],"strides":[1],"storage_offset":0')),
     "does not say where 'z' is"),
    ("program_of_huge_sizes", _program(lambda: b'{"config":{"a":{"path_name":"w","tensor_meta":{"dtype":7,"sizes":['
                                       + b"9223372036854775807," * 63 + b'2],"strides":[' + b"0," * 63
                                       + b'0],"storage_offset":0}}}}'), "more elements than 64 bits can count"),
    ("program_of_1_800_000_buffers",
     lambda: _program(lambda: b"{}", _NO_CONSTANTS,
                      Record("m/models/model.json", _buffers(), method=DEFLATED))(), "has no config"),
    ("program_with_buffers_only",
     lambda: _program(lambda: b'{"config":{}}', _NO_CONSTANTS,
                      Record("m/models/model.json", _buffers(), method=DEFLATED))(), None),
    ("program_of_a_zip_within_itself", _program(lambda: b'{"config":{"a":{"path_name":"../../archive_format",'
                                                b'"use_pickle":true,"tensor_meta":{}}}}'), "has no record"),
]  # fmt: skip
"""Name, file, and a part of the error or None where it may open."""
