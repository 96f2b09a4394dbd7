"""Hold what ckpt reads of other libraries' containers to these libraries: Stable-Baselines3, Flax, ONNX, h5py.

`make environments` runs this in an environment that has them. It writes a few files with each and compares every
tensor; a library that is not installed is named, and the exit code is 1.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
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


LIBRARIES: dict[str, Callable[[], None]] = {"stable_baselines3": stable_baselines3, "flax": flax, "onnx": onnx}


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
