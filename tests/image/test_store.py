"""The store of tensors: what is written comes back, and what is damaged is told and mended."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from alignkit.errors import DataError
from alignkit_diffusion.cache import store as module
from alignkit_diffusion.cache.index import Index
from alignkit_diffusion.cache.job import Job
from alignkit_diffusion.cache.keys import short_hash
from alignkit_diffusion.cache.shard import Damaged
from alignkit_diffusion.cache.store import Store


def key(number: int) -> bytes:
    return short_hash(str(number))


def entry(number: int) -> dict[str, torch.Tensor]:
    shape = (2, 3, 4) if number % 3 else (2, 4, 3)
    made = torch.Generator().manual_seed(number)
    found = {"mean": torch.randn(shape, generator=made).to(torch.bfloat16)}
    return found if number % 2 else {**found, "std": torch.rand(shape, generator=made).half()}


def filled(folder: Path, *batches: range) -> Store:
    store = Store(folder)
    for numbers in batches:
        for number in numbers:
            store.put(key(number), entry(number))
        store.flush()
    return store


def same(found: object, number: int) -> bool:
    expected = entry(number)
    assert isinstance(found, dict)
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def flip_a_bit(path: Path, tensor: str = "0.mean") -> None:
    """In the first entry of a group of a shard."""
    raw = bytearray(path.read_bytes())
    size = int.from_bytes(raw[:8], "little")
    start = json.loads(raw[8 : 8 + size])[tensor]["data_offsets"][0]
    raw[8 + size + start + 1] ^= 1
    path.write_bytes(raw)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


def test_entries_come_back_from_this_process_and_another(tmp_path: Path) -> None:
    store = filled(tmp_path, range(0, 7), range(7, 12))
    store.put(key(12), entry(12))
    assert len(store) == 13 and len(shards(tmp_path)) == 2
    assert same(store.get(key(12)), 12)
    store.save_index()
    for number in range(13):
        assert same(Store(tmp_path).get(key(number)), number)
    assert Store(tmp_path).get(key(13)) is None and key(13) not in store
    keys = np.frombuffer(b"".join(map(key, range(20))), np.uint8).reshape(-1, 16)
    assert Store(tmp_path).missing(keys).tolist() == [False] * 13 + [True] * 7


def test_shards_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 200)
    filled(tmp_path, range(20))
    assert len(shards(tmp_path)) >= 5


def test_other_processes_shards_are_found(tmp_path: Path) -> None:
    one, other = Store(tmp_path), Store(tmp_path)
    one.put(key(0), entry(0))
    one.flush()
    assert key(0) not in other
    other.refresh()
    assert same(other.get(key(0)), 0)


@pytest.mark.parametrize("harm", [b"", b"PK\x03\x04 and no more", None])
def test_an_index_that_is_cut_off_is_made_again(tmp_path: Path, harm: bytes | None) -> None:
    filled(tmp_path, range(6)).save_index()
    path = tmp_path / "index.arrays"
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2] if harm is None else harm)
    assert len(Store(tmp_path)) == 6 and same(Store(tmp_path).get(key(3)), 3)


def test_an_index_with_a_flipped_bit_is_made_again(tmp_path: Path) -> None:
    filled(tmp_path, range(6)).save_index()
    raw = bytearray((tmp_path / "index.arrays").read_bytes())
    for at in range(200, len(raw), 97):
        flipped = raw.copy()
        flipped[at] ^= 4
        (tmp_path / "index.arrays").write_bytes(flipped)
        store = Store(tmp_path)
        assert len(store) == 6 and same(store.get(key(2)), 2)


def test_a_missing_shard_costs_its_own_entries(tmp_path: Path) -> None:
    filled(tmp_path, range(0, 4), range(4, 9)).save_index()
    shards(tmp_path)[0].unlink()
    store = Store(tmp_path)
    assert len(store) == 5 and key(0) not in store and same(store.get(key(8)), 8)


def test_flipped_bits_are_told_and_cost_one_entry(tmp_path: Path) -> None:
    filled(tmp_path, range(8)).save_index()
    (path,) = shards(tmp_path)
    flip_a_bit(path)
    store = Store(tmp_path)
    damaged = []
    for number in range(8):
        try:
            assert same(store.get(key(number)), number)
        except Damaged as error:
            assert path.name in str(error)
            damaged.append(number)
    assert len(damaged) == 1
    assert store.mend(path.name) == 1 and not path.exists()
    again = Store(tmp_path)
    assert len(again) == 7 and key(damaged[0]) not in again
    assert again.verify() == 0


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    filled(tmp_path, range(5)).save_index()
    (path,) = shards(tmp_path)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for at in [3, 20, 60, *range(start, len(whole), 11)]:
        raw = bytearray(whole)
        raw[at] ^= 16
        for old in tmp_path.iterdir():
            old.unlink()
        path.write_bytes(raw)
        store = Store(tmp_path)
        store.verify()
        left = [number for number in range(5) if key(number) in store]
        assert all(same(store.get(key(number)), number) for number in left), at
        assert len(left) < 5 or all(same(Store(tmp_path).get(key(n)), n) for n in range(5)), at


def test_a_shard_cut_off_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path, range(0, 4), range(4, 9))
    path = shards(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:100])
    store = Store(tmp_path)
    assert len(store) == 4 and "set aside" in caplog.text
    assert path.with_suffix(".damaged").exists() and len(Store(tmp_path)) == 4


def test_a_full_disk_says_so_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path, range(4))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store.put(key(4), entry(4))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"No space left.*Free some space.*goes on"):
            store.flush()
    assert len(Store(tmp_path)) == 4 and not list(tmp_path.glob(".alignkit*"))
    store.flush()
    assert len(Store(tmp_path)) == 5


def test_keys_that_begin_alike_are_told_apart() -> None:
    index = Index()
    keys = np.zeros((4, 16), np.uint8)
    keys[:, 15] = [3, 1, 2, 9]
    index.add_shard("a", 1, [keys[:3]], [np.arange(3)], [("x",)])
    assert index.contains(keys).tolist() == [True, True, True, False]
    for row in range(3):
        place = index.find(keys[row].tobytes())
        assert place is not None and (place.row, place.checksum) == (row, row)
    assert index.find(keys[3].tobytes()) is None


def test_a_job_hands_out_what_is_left_and_forgets_a_damaged_result(tmp_path: Path) -> None:
    job = Job(tmp_path)
    seen = []
    for block in job.work(3):
        seen.append(block)
        if block == 1:
            break
        job.done(block, {"x": np.array([block])})
    assert seen == [0, 1] and list(Job(tmp_path).work(1)) == []
    for block in Job(tmp_path).work(3):
        seen.append(block)
        job.done(block, {"x": np.array([block])})
    assert seen == [0, 1, 1, 2]
    job.finish({"x": np.arange(3)})
    assert list(job.work(3)) == [] and job.part(0) is None
    path = tmp_path / "table.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert job.result() is None and not path.exists()
