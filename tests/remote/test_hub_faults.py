"""Every fault of the hub or its CDN, at every request of a command: the right answer, or one line and nothing mixed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from fake_hub import Answer, Asked, FakeHub, serving
from golden_cases import answer_to
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckpt_cli.remote import client

REPO = "lab/model"
OTHER = "f" * 40

Fault = Callable[[FakeHub, Asked], Answer]


def _changed(**headers: str) -> Fault:
    """A fault that changes headers of the right reply, and adds what is not there."""

    def fault(hub: FakeHub, asked: Asked) -> Answer:
        status, found, body = _right(hub, asked)
        return status, {**found, **{name.replace("_", "-"): value for name, value in headers.items()}}, body

    return fault


def _right(hub: FakeHub, asked: Asked) -> Answer:
    return hub.answer(asked, b"") if asked.server == "hub" else hub.answer_cdn(asked, b"")


def _status(status: int, **headers: str) -> Fault:
    return lambda _hub, _asked: (status, {name.replace("_", "-"): value for name, value in headers.items()}, b"{}")


FAULTS: Mapping[str, Fault] = {
    "503": _status(503),
    "429": _status(429, Retry_After="1"),
    "401": _status(401),
    "401 gated": _status(401, X_Error_Code="GatedRepo"),
    "403": _status(403),
    "404": _status(404),
    "404 entry": _status(404, X_Error_Code="EntryNotFound"),
    "410": _status(410),
    "412": _status(412),
    "416": _status(416, Content_Range="bytes */7"),
    "empty": _status(200),
    "a page": lambda _hub, _asked: (200, {"Content-Type": "text/html"}, b"<html>please log in</html>"),
    "another commit": _changed(X_Repo_Commit=OTHER),
    "no commit": _changed(X_Repo_Commit=""),
    "another content": _changed(X_Linked_ETag=f'"{OTHER}"'),
    "another tag": _changed(ETag='"other"'),
    "another size": _changed(Content_Range="bytes 0-99/12345"),
    "gzip": _changed(Content_Encoding="gzip"),
    "a redirect to itself": lambda _hub, asked: (302, {"Location": asked.path}, b""),
    "a redirect to a file": _status(302, Location="file:///etc/passwd"),
    "a redirect to no place": _status(302, Location="http://[::"),
    "a list without an end": _changed(Link='<http://127.0.0.1:9/x?cursor=1>; rel="next"'),
}
"""What goes wrong with one request, or from one request on."""

COMMANDS = ("hash FILE", "show FILE w2[:3]", "info FILE/one.pt")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """A hub with a set of shards and a file."""
    folder = tmp_path_factory.mktemp("hub")
    for number in (1, 2):
        tensors = {f"w{number}": torch.arange(200_000.0) + number}
        save_file(tensors, folder / f"model-{number:05}-of-00002.safetensors", metadata={"format": "pt"})
    places = '"w1": "model-00001-of-00002.safetensors", "w2": "model-00002-of-00002.safetensors"'
    index = '{"metadata": {"total_size": 1600000}, "weight_map": {' + places + "}}"
    (folder / "model.safetensors.index.json").write_text(index)
    torch.save({"w": torch.arange(6.0)}, folder / "one.pt")
    with serving() as hub, pytest.MonkeyPatch.context() as patched:
        for name in [name for name in os.environ if name.startswith("HF_") or name.lower().endswith("_proxy")]:
            patched.delenv(name)
        patched.setenv("HF_ENDPOINT", hub.url)
        patched.setenv("HF_HOME", str(folder / "none"))
        patched.setattr(client, "sleep", lambda _: None)
        hub.commit(REPO, folder)
        yield hub


@pytest.fixture(scope="module")
def right(hub: FakeHub) -> Mapping[str, tuple[str, int]]:
    """What each command prints where nothing goes wrong, and the number of its requests."""
    found = {}
    for command in COMMANDS:
        hub.forget()
        found[command] = answer_to(_args(command)), len(hub.log)
        assert "[exit" not in found[command][0]
    return found


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(command=st.sampled_from(COMMANDS), name=st.sampled_from(sorted(FAULTS)), at=st.integers(0, 12), data=st.data())
def test_a_fault_at_any_request_ends_in_the_right_answer_or_in_one_line(
    command: str, name: str, at: int, data: st.DataObject, hub: FakeHub, right: Mapping[str, tuple[str, int]]
) -> None:
    wanted, count = right[command]
    times = data.draw(st.sampled_from((1, 2, 10**9)))
    hub.forget()
    hub.interrupt = _at(hub, min(at, count), times, FAULTS[name])
    answer = answer_to(_args(command))
    hub.interrupt = lambda _: None
    assert "Traceback" not in answer
    assert len(hub.log) < 100
    if answer != wanted:
        lines = answer.splitlines()
        assert lines[0].startswith(f"2> ckpt: hf://{REPO}")
        assert lines[-1] == "[exit 2]"
        assert [line for line in lines[1:-1] if not line.startswith("2> hint: ")] == []


def _args(command: str) -> list[str]:
    return command.replace("FILE", f"hf://{REPO}").split()


def _at(hub: FakeHub, at: int, times: int, fault: Fault) -> Callable[[Asked], Answer | None]:
    """A fault of some requests from the one of a number on."""
    counts = iter(range(10**9))

    def interrupt(asked: Asked) -> Answer | None:
        return fault(hub, asked) if at <= next(counts) < at + times else None

    return interrupt
