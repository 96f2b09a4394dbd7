"""Hold what ckpt reads of other libraries' containers to these libraries: Stable-Baselines3, Flax, ONNX, h5py.

`make environments` runs this in an environment that has them. It writes a few files with each and compares every
tensor; a library that is not installed is named, and the exit code is 1.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pathlib
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import ckpt_cli


def compare(path: str, expected: Mapping[str, Any]) -> None:
    """Compare all tensors of a checkpoint by their names; raises AssertionError for one that is not the same."""
    with ckpt_cli.open(path) as checkpoint:
        for name, array in expected.items():
            found = np.asarray(checkpoint[name])
            wide = np.asarray(array, found.dtype) if found.dtype.kind == "V" else np.asarray(array)
            assert found.shape == wide.shape, (name, found.shape, wide.shape)
            assert np.array_equal(found.astype("f8"), wide.astype("f8")), name
    print(f"{os.path.basename(path)}: {len(expected)} tensors are those of the library")


def stable_baselines3() -> None:
    """Write a trained PPO and a SAC, set an element, and load them again."""
    from stable_baselines3 import PPO, SAC

    for kind, environment, options in (
        (PPO, "CartPole-v1", {"n_steps": 16, "batch_size": 8}),
        (SAC, "Pendulum-v1", {"buffer_size": 50, "learning_starts": 5}),
    ):
        model = kind("MlpPolicy", environment, device="cpu", **options)
        model.learn(16)
        path = f"{kind.__name__.lower()}.zip"
        model.save(path)
        state = {f"policy.{name}": tensor.numpy() for name, tensor in model.policy.state_dict().items()}
        compare(path, state)
        name = next(iter(state))
        ckpt_cli.set(path, [f"{name}[0]=3"])
        state[name][0] = 3
        loaded = kind.load(path, device="cpu")
        compare(path, {f"policy.{name}": tensor.numpy() for name, tensor in loaded.policy.state_dict().items()})


def flax() -> None:
    """Write a state with bfloat16, scalars and chunks."""
    from flax import serialization

    bfloat16 = importlib.import_module("ml_dtypes").bfloat16
    random = np.random.default_rng(0)
    arrays = {
        "params": {"Dense_0": {"kernel": random.normal(size=(30, 40)).astype("f4"), "bias": np.ones(4, bfloat16)}},
        "opt": {"0": {"count": np.int32(3), "mu": random.normal(size=(7, 5, 3))}, "1": {}},
        "step": 7,
    }
    serialization.MAX_CHUNK_SIZE = 200
    with open("state.msgpack", "wb") as file:
        file.write(serialization.to_bytes(arrays))
    kernel, bias = arrays["params"]["Dense_0"].values()
    expected = {"params.Dense_0.kernel": kernel, "params.Dense_0.bias": bias, "opt.0.mu": arrays["opt"]["0"]["mu"]}
    compare("state.msgpack", expected)
    ckpt_cli.set("state.msgpack", ["opt.0.mu[2,1]=5"])
    with open("state.msgpack", "rb") as file:
        again = serialization.msgpack_restore(file.read())["opt"]["0"]["mu"]
    assert (again[2, 1] == 5).all()
    compare("state.msgpack", {"opt.0.mu": again})


def onnx() -> None:
    """Write a model with initializers of every kind, with external data too."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    made = [numpy_helper.from_array(random.normal(size=(30, 4)).astype("f4"), "fc.weight")]
    names = ("FLOAT", "DOUBLE", "INT64", "INT32", "INT16", "INT8", "UINT8", "UINT16", "UINT32", "UINT64", "BOOL",
             "FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E5M2")  # fmt: skip
    made += [helper.make_tensor(name, getattr(TensorProto, name), [3], [1, 0, 1]) for name in names]
    graph = helper.make_graph([], "g", [], [], made)
    model = helper.make_model(graph, producer_name="pytorch")
    expected = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    onnx.save(model, "m.onnx")
    compare("m.onnx", expected)
    onnx.save(model, "e.onnx", save_as_external_data=True, location="e.data", size_threshold=16)
    compare("e.onnx", expected)


def h5py() -> None:
    """Write datasets in one piece, in chunks, compressed, of another byte order, and links to other files."""
    import h5py

    random = np.random.default_rng(0)
    expected = {
        "layers.dense.vars.0": random.normal(size=(30, 40)).astype("f4"),
        "layers.big.vars.0": random.normal(size=(300, 4)),
        "layers.chunks.vars.0": random.normal(size=(9, 5, 3)),
        "optimizer.vars.0": np.int64(7),
        "big_endian": np.arange(5, dtype=">f8"),
        "empty": np.zeros((0, 3), "f4"),
        "half": np.ones((2, 2), "f2"),
    }
    options: dict[str, dict[str, Any]] = {
        "layers.big.vars.0": {"chunks": (7, 3), "compression": "gzip", "shuffle": True, "fletcher32": True},
        "layers.chunks.vars.0": {"chunks": (2, 2, 2)},
    }
    with h5py.File("m.weights.h5", "w") as file:
        file.attrs["keras_version"] = "3.3"
        for name, array in expected.items():
            file.create_dataset(name.replace(".", "/"), data=array, **options.get(name, {}))
        file["external"] = h5py.ExternalLink("/etc/x.h5", "/a")
        file["soft"] = h5py.SoftLink("/half")
        file["round"] = file["/"]
        file.create_dataset("outside", (4,), "u1", external=[("/etc/passwd", 0, 4)])
    compare("m.weights.h5", expected)
    with ckpt_cli.open("m.weights.h5") as checkpoint:
        others = {name for name in checkpoint if name not in expected}
    assert others == {"external", "soft", "outside"}, others
    ckpt_cli.set("m.weights.h5", ["layers.dense.vars.0[2,1]=5"])
    with h5py.File("m.weights.h5") as file:
        assert file["layers/dense/vars/0"][2, 1] == 5
    with zipfile.ZipFile("m.keras", "w") as archive:  # as keras/src/saving/saving_lib.py writes it
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", "{}")
        archive.write("m.weights.h5", "model.weights.h5")
    with ckpt_cli.open("m.keras") as checkpoint:
        assert np.asarray(checkpoint["layers.dense.vars.0"])[2, 1] == 5
    ckpt_cli.set("m.keras", ["layers.dense.vars.0[2,1]=6"])
    with zipfile.ZipFile("m.keras") as archive:
        assert archive.testzip() is None
        archive.extract("model.weights.h5")
    with h5py.File("model.weights.h5") as file:
        assert file["layers/dense/vars/0"][2, 1] == 6
    refused(lambda: ckpt_cli.set("m.weights.h5", ["layers.big.vars.0[0]=1"]), "stored in chunks")
    with h5py.File("bomb.h5", "w") as file:
        made = file.create_dataset("a", (1000,), "u1", chunks=(1000,), compression="gzip")
        made.id.write_direct_chunk((0,), zlib.compress(bytes(50_000_000)))
    refused(lambda: ckpt_cli.open("bomb.h5")["a"].numpy(), "inflates to more than its size")
    whole = bytearray(pathlib.Path("m.weights.h5").read_bytes())
    for cut in range(8, len(whole), 997):
        pathlib.Path("cut.h5").write_bytes(whole[:cut])
        with contextlib.suppress(ckpt_cli.CkptError):
            ckpt_cli.open("cut.h5").close()


def refused(call: Callable[[], object], words: str) -> None:
    """Call something that must be refused with an error that has some words in it."""
    said = ""
    try:
        call()
    except ckpt_cli.CkptError as error:
        said = str(error)
    assert words in said, said or f"not refused: {words}"


LIBRARIES: dict[str, Callable[[], None]] = {each.__name__: each for each in (stable_baselines3, flax, onnx, h5py)}


def main(wanted: list[str]) -> int:
    """Run the parts for all libraries, or for those that are named."""
    missing = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in wanted or LIBRARIES:
            try:
                importlib.import_module(name)
            except ImportError as error:
                missing.append(f"{name} ({error})")
                continue
            LIBRARIES[name]()
    if missing:
        print(f"not compared, for they are not installed: {', '.join(missing)}", file=sys.stderr)
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
