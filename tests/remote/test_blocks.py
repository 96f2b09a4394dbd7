"""Memory that long parts are received into is used again, and never while somebody reads it."""

from __future__ import annotations

import pytest
from test_source import BYTES, SIZE, Counted

from ckpt_cli.remote import fetched as fetching
from ckpt_cli.remote.blocks import Blocks
from ckpt_cli.remote.fetched import PAGE, Fetched
from ckpt_cli.remote.source import RemoteFile


def test_a_block_is_given_out_again_once_nobody_has_a_view_of_it() -> None:
    blocks = Blocks(1 << 20)
    block = blocks.take(1 << 20)
    view = memoryview(block)[100:200]
    blocks.give(block)
    assert blocks.take(1 << 20) is not block
    view.release()
    assert blocks.take((1 << 20) - 5) is block
    assert blocks.take(1 << 20) is not block


def test_short_parts_have_memory_of_their_own_and_few_blocks_are_kept() -> None:
    blocks = Blocks(1 << 20)
    assert len(blocks.take(1000)) == 1000
    taken = [blocks.take(1 << 20) for _ in range(20)]
    for block in taken:
        blocks.give(block)
    assert sum(any(blocks.take(1 << 20) is block for block in taken) for _ in range(20)) <= 4


def test_what_was_read_stays_as_it_was_while_more_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "PART", 1 << 16)
    file = RemoteFile("x", Counted(), Fetched())
    views = []
    for at in range(0, SIZE - (1 << 16), 1 << 16):
        file.expect(at, 1 << 16)
        views.append((at, file.view(at, 1 << 16)))
    assert all(view == BYTES[at : at + (1 << 16)] for at, view in views)


def test_pages_that_are_missing_are_found_whatever_was_kept_and_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_PAGES", 5)
    monkeypatch.setattr(fetching, "KEPT", 3 * PAGE)
    fetched = Fetched()
    for first, count in ((0, 3), (126, 4), (300, 2), (1, 1), (700, 5)):
        fetched.keep(0, first, bytes(count * PAGE))
    there = {number for number in range(1000) if fetched.page(0, number) is not None}
    missing = {number for first, end in fetched.missing(0, 0, 1000) for number in range(first, end)}
    assert (there | missing, there & missing) == (set(range(1000)), set())
    assert there == {0, 1, 2, *range(700, 705)}
    assert fetched.missing(1, 5, 500) == [(5, 500)]
    fetched.clear()
    assert fetched.missing(0, 0, 1000) == [(0, 1000)]
