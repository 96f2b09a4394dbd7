"""The edits that faults are tried on: each edit, each container, and the files that they start from."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

LONG = "a.prefix.that.the.file.has.no.room.for" * 9


@dataclass(frozen=True)
class Scene:
    """An edit, and what it is about."""

    target: str
    """The file or folder that must be wholly old or wholly new."""
    command: tuple[str, ...]
    then: str = "*.weight=1"
    """An assignment that the target takes whether it is old or new."""


def _scene(line: str, target: str = "", then: str = "*.weight=1") -> Scene:
    command = tuple(line.replace("LONG", LONG).split())
    output = command[command.index("-o") + 1] if "-o" in command else ""
    return Scene(target or output or command[1], command, then)


SCENES = {
    # values in place
    "set, zip": _scene("set a.pt 2.weight[0,0]=100 3.bias=[1,2,3] 0.weight[::2,1]*=2"),
    "set, safetensors": _scene("set a.safetensors 2.weight[0,0]=100 3.bias+=1"),
    "set, legacy": _scene("set old.pt 2.weight[0,0]=100 3.bias=[1,2,3]"),
    "set, safetensors shards": _scene("set sharded 0.bias[1]=100 3.bias=[1,2,3]"),
    "set, bin shards": _scene("set shards 0.bias[1]=100 3.bias=[1,2,3] 2.weight[0]*=2"),
    "set, distributed": _scene("set dcp 3.bias=[1,2,3] 0.bias=5"),
    "set, npz": _scene("set a.npz w[0]=7", then="v=1"),
    "set, npy": _scene("set a.npy *[1]=7", then="*[2]=1"),
    "set, tar": _scene("set old.tar a=7", then="p=1"),
    "set, msgpack": _scene("set a.msgpack 2.weight[0,0]=100 3.bias=[1,2,3]", then="3.weight=1"),
    "set, onnx": _scene("set a.onnx 2.weight[0,0]=100 3.bias=[1,2,3]", then="3.weight=1"),
    "set, archive of nemo": _scene("set a.nemo 2.weight[0,0]=100 3.bias=[1,2,3]", then="3.weight=1"),
    "set, stable-baselines3": _scene("set a.zip policy.2.weight[0,0]=100 policy.3.bias=1", then="policy.3.weight=1"),
    "set with a backup": _scene("set --backup a.pt 2.weight[0,0]=100", "a.pt", then="3.weight=1"),
    "set with a backup, shards": _scene("set --backup shards 0.bias[1]=100 3.bias=[1,2,3]", "shards"),
    # values to a new file
    "set to a new file": _scene("set a.pt 2.weight[0,0]=100 -o out.pt"),
    "set to a file that is there": _scene("set a.pt 2.weight[0,0]=100 -o there.pt", then="*.weight=1"),
    "set shards to a new folder": _scene("set shards 3.bias=0 0.bias=1 -o out"),
    "set to a new safetensors": _scene("set a.safetensors 3.bias=0 -o out.st"),
    # values in the pickle
    "set values": _scene("set train.pt epoch=123456789 w[0]=5 --backup", then="w=1"),
    "set values by as much": _scene("set train.pt epoch=7 w[0]=5", then="w=1"),
    "set values, legacy": _scene("set train.legacy epoch=123456789 w[0]=5", then="w=1"),
    # names
    "rename": _scene("rename a.pt --add net"),
    "rename by as much": _scene("rename a.pt 3 4"),
    "rename by more": _scene("rename a.pt --add LONG"),
    "rename by less after that": _scene("rename longer.pt --strip " + "p" * 900),
    "rename, legacy": _scene("rename old.pt --add net"),
    "rename a header in place": _scene(r"rename a.safetensors --sub \.weight$ .w", then="*.bias=1"),
    "rename with a new header": _scene("rename a.safetensors --add a.prefix.as.long.as.that"),
    "rename, bin shards": _scene("rename shards --add net", then="*.bias=1"),
    "rename by more, bin shards": _scene("rename shards --add " + "a.prefix.that.is.long" * 200, then="*.bias=1"),
    "rename, safetensors shards": _scene("rename sharded --add net"),
    "rename to a new file": _scene("rename a.pt --add net -o out.pt"),
    # other edits
    "meta": _scene("meta a.safetensors f=p"),
    "meta by more": _scene("meta a.safetensors f=" + "p" * 3000),
    "rm with a backup": _scene("rm a.pt 3 --backup"),
    "rm, legacy": _scene("rm old.pt 3"),
    "rm a shard": _scene("rm sharded 0 3.bias"),
    "rm a shard with a backup": _scene("rm sharded 0 3.bias --backup"),
    "rm with the states of an optimizer": _scene("rm run.pt model.0.bias --backup", then="model.0.weight=1"),
    "keep": _scene("keep a.pt 3"),
    "keep, to a file that is there": _scene("keep a.pt 3 -o there.pt"),
    "cast": _scene("cast a.pt bfloat16"),
    "cast, safetensors with a backup": _scene("cast a.safetensors float16 --backup"),
    "cast in shards with a backup": _scene("cast sharded float16 3.bias --backup"),
    "to": _scene("to gpu.pt cpu"),
    "to, legacy": _scene("to gpu.legacy cpu"),
    "to, bin shards, with a backup": _scene("to gpus cpu --backup"),
    "tie": _scene("tie apart.pt 0.bias 2.bias"),
    "tie in shards to a new folder": _scene("tie sharded 0.weight 2.weight --force -o out"),
    "untie": _scene("untie a.pt 2.weight"),
    "untie a legacy stream": _scene("untie old.pt 2.weight"),
    "untie to a new file": _scene("untie a.pt 2.weight -o out.pt"),
    "compact": _scene("compact wide.pt", then="a=1"),
    "compact, legacy, to a file that is there": _scene("compact wide.legacy -o there.pt", then="*=1"),
    "index": _scene("index sharded"),
    "index with a backup": _scene("index sharded --backup"),
    "undo": _scene("undo edited.pt"),
    "undo in shards": _scene("undo edited"),
    # the files of a run
    "set in a run": _scene("set run model.0.bias[0]=100 optimizer.state.*.exp_avg=7"),
    "set values in a run with a backup": _scene(
        "set --backup run optimizer.param_groups.0.lr=0.123456789 trainer_state.epoch=123456 scheduler.last_epoch=9",
        "run",
    ),
    "rename in a run": _scene(r"rename run --sub \.(bias|exp_avg)$ .other.\1"),
    "rm in a run": _scene("rm run optimizer scheduler model.0.bias trainer_state.log_history --backup", "run"),
    "cast in a run": _scene("cast run bfloat16 model optimizer"),
    "keep of a run to a new folder": _scene("keep run model.0 model.1 rng_state -o out"),
    "undo in a run": _scene("undo cut"),
    # those of a run that has folders of its own
    "set in the folders of a run": _scene("set parts model.0.bias=7 optimizer.state.0.bias.exp_avg=5 scheduler.n=4"),
    "set in a run with the files of ranks": _scene("set ranks scheduler.n=4 rng_state_0.x=2 -o out", then="*.x=1"),
    "rename in the folders of a run": _scene(r"rename parts --sub \b0\.bias\b 0.b", then="*.weight=1"),
    "rm a folder of a run": _scene("rm parts optimizer model.0.bias"),
    # distributed checkpoints, whose other edits replace what says where items are
    "rename, distributed": _scene("rename dcp --add net"),
    "rm, distributed, with a backup": _scene("rm dcp 3 --backup"),
    "cast, distributed": _scene("cast dcp bfloat16 0.weight 3.bias"),
    "cast, distributed, with a backup": _scene("cast dcp bfloat16 --backup"),
    "compact, distributed": _scene("compact holes"),
    "keep, distributed, to a new folder": _scene("keep dcp 3 -o out"),
    # conversions
    "convert to a new file": _scene("convert a.pt out.safetensors --force", "out.safetensors"),
    "convert to a file that is there": _scene("convert a.safetensors there.pt --force", "there.pt"),
    "convert to npz": _scene("convert a.safetensors out.npz", "out.npz"),
    "convert to a new folder": _scene("convert a.pt out --max-shard 300B --force", "out"),
    "convert to a distributed one": _scene("convert a.pt out --to dcp", "out"),
    "convert within a folder": _scene("convert shards shards --to hf-bin --max-shard 1MB --force", "shards"),
}
"""By what it is called."""


def fill(folder: Path) -> None:
    """Write the files that the edits start from."""
    import numpy as np
    import torch
    from containers import write_msgpack, write_onnx, write_policy
    from contract import write_shards
    from dcp_formats import save as save_distributed
    from run_folders import run_folder
    from safetensors.torch import save_file, save_model
    from torch import nn
    from zero_folders import zero_folder

    from ckpt_cli.cli.main import run

    def net() -> dict[str, torch.Tensor]:
        """The state of a network whose layers 0 and 2 are one; in its own words, two biases are equal."""
        torch.manual_seed(0)
        shared = nn.Linear(8, 8)
        state: dict[str, torch.Tensor] = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(8, 3)).state_dict()
        return state

    apart = {name: tensor.clone() for name, tensor in net().items()}
    torch.save(net(), folder / "a.pt")
    torch.save(apart, folder / "apart.pt")
    torch.save(net(), folder / "longer.pt")
    assert run(["rename", str(folder / "longer.pt"), "--add", "p" * 900]) == 0
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    save_model(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(8, 3)), str(folder / "a.safetensors"))
    torch.save({"other.weight": torch.ones(3)}, folder / "there.pt")
    torch.save(net(), folder / "old.pt", _use_new_zipfile_serialization=False)
    train = {"epoch": 3, "w": torch.ones(3)}
    torch.save(train, folder / "train.pt")
    torch.save(train, folder / "train.legacy", _use_new_zipfile_serialization=False)
    layers = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    adam = torch.optim.Adam(layers.named_parameters())
    layers(torch.ones(1, 2)).sum().backward()
    adam.step()
    torch.save({"model": layers.state_dict(), "optimizer": adam.state_dict()}, folder / "run.pt")
    wide = {"a": torch.arange(1000.0)[:3], "b": torch.ones(2)}
    torch.save(wide, folder / "wide.pt")
    torch.save(wide, folder / "wide.legacy", _use_new_zipfile_serialization=False)
    np.savez(folder / "a.npz", w=np.ones(3, np.float32), v=np.zeros(2))
    np.save(folder / "a.npy", np.arange(4.0))
    (folder / "old.tar").write_bytes((Path(__file__).parent.parent / "samples").joinpath("old.tar").read_bytes())
    write_msgpack(apart, folder / "a.msgpack")
    write_onnx(apart, folder / "a.onnx")
    with tarfile.open(folder / "a.nemo", "w") as archive:
        archive.add(folder / "apart.pt", "./model_weights.ckpt")
    write_policy(apart, folder / "a.zip")
    write_shards(net(), folder / "shards")
    for name, of in (("gpu.pt", "a.pt"), ("gpu.legacy", "old.pt"), ("gpus", "shards")):
        assert run(["to", str(folder / of), "cuda:0", "-o", str(folder / name)]) == 0
    save_distributed(apart, folder / "dcp")
    save_distributed(apart, folder / "holes")
    assert run(["rm", str(folder / "holes"), "0.bias"]) == 0
    (folder / "sharded").mkdir()
    weight_map = {name: f"model-{int(name[0]) // 2 + 1:05}-of-00002.safetensors" for name in apart}
    weight_map |= {name: "model-00003-of-00003.safetensors" for name in apart if name[0] == "0"}
    for shard in set(weight_map.values()):
        save_file({name: apart[name] for name in apart if weight_map[name] == shard}, folder / "sharded" / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(folder / "a.pt", folder / "edited.pt")
    assert run(["set", str(folder / "edited.pt"), "3.bias=1", "--backup"]) == 0
    run_folder(folder / "run", "shards")
    shutil.copytree(folder / "run", folder / "cut")
    assert run(["rm", str(folder / "cut"), "optimizer", "model.0.bias", "--backup"]) == 0
    save_distributed({f"model.{name}": tensor for name, tensor in apart.items()}, folder / "parts/pytorch_model_fsdp_0")
    states = {f"optimizer.state.{name}.exp_avg": tensor for name, tensor in apart.items()}
    save_distributed(states, folder / "parts/optimizer_0")
    zero_folder(folder / "ranks", 2, 2, [apart])
    for run_of in ("parts", "ranks"):
        torch.save({"n": 3}, folder / run_of / "scheduler.bin")
        torch.save({"x": torch.ones(2)}, folder / run_of / "random_states_0.pkl")
    shutil.copytree(folder / "sharded", folder / "edited")
    assert run(["rm", str(folder / "edited"), "0", "3.bias", "--backup"]) == 0
