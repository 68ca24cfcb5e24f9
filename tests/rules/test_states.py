"""Shared and private states as bytes: one way to write them, and nothing else is read."""

from __future__ import annotations

import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from shoal.identity import blake3_hash
from shoal.training.private import PrivateState
from shoal.training.state import MOMENTUM_PREFIX, BadState, Layout, SharedState

SHAPES = {"b.weight": (3, 5), "a": (7,), "c.bias": (), "B": (2, 1, 4)}


def a_state(*, momentum: bool = False) -> SharedState:
    layout = Layout.of(SHAPES)
    return SharedState.start(layout, np.arange(layout.size, dtype=np.float32) / 7, momentum=momentum)


def test_tensors_lie_one_after_another_by_name() -> None:
    layout = Layout.of(SHAPES)
    assert [tensor.name for tensor in layout.tensors] == ["B", "a", "b.weight", "c.bias"]
    assert [(tensor.start, tensor.stop) for tensor in layout.tensors] == [(0, 8), (8, 15), (15, 30), (30, 31)]
    flat = np.arange(31, dtype=np.float32)
    views = layout.views(flat)
    assert views["b.weight"].shape == (3, 5) and views["b.weight"][0, 0] == 15 and views["c.bias"] == 30
    assert layout == Layout.of(dict(reversed(list(SHAPES.items()))))


@pytest.mark.parametrize("momentum", [False, True])
def test_the_file_is_safetensors_and_its_blake3_is_the_hash(tmp_path: Path, momentum: bool) -> None:
    state = a_state(momentum=momentum)
    data = state.to_bytes()
    state.write(tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == data and len(data) == state.size
    assert state.hash == blake3_hash(data)
    tensors = load_safetensors(data)
    assert (tensors["b.weight"] == state.layout.views(state.parameters)["b.weight"]).all()
    assert (MOMENTUM_PREFIX + "a" in tensors) == momentum
    again = SharedState.read(tmp_path / "state")
    assert again.hash == state.hash and again.layout == state.layout and again.to_bytes() == data


def test_the_start_of_a_nesterov_job_has_no_momentum_yet() -> None:
    state = a_state(momentum=True)
    assert state.momentum is not None and not state.momentum.any()
    assert a_state(momentum=False).momentum is None


def test_the_hash_is_that_of_every_other_machine() -> None:
    assert a_state().hash.hex()[:16] == "1eb313633ff6696f"
    assert PrivateState.fresh(4, 3).hash.hex()[:16] == "27f3e07898b32dae"


def test_another_way_to_write_the_same_tensors_is_refused() -> None:
    """Else one state would have two names."""
    tensors = {name: np.ones(shape, dtype=np.float32) for name, shape in SHAPES.items()}
    with pytest.raises(BadState, match="not written the one way|does not lie where|is not safetensors"):
        SharedState.from_bytes(save_safetensors(tensors, metadata={"format": "pt"}))
    data = a_state().to_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    padded = struct.pack("<Q", length + 8) + data[8 : 8 + length] + b" " * 8 + data[8 + length :]
    with pytest.raises(BadState, match="not written the one way"):
        SharedState.from_bytes(padded)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda data: data[:5], "too short"),
        (lambda data: data[:-1], "its header says"),
        (lambda data: data + b"\0", "its header says"),
        (lambda data: struct.pack("<Q", 1 << 60) + data[8:], "header claims"),
        (lambda data: data.replace(b'"F32"', b'"F64"', 1), "is F64"),
        (lambda data: data.replace(b"[3,5]", b"[5,4]"), "does not lie where its shape says"),
        (lambda data: data[:-4] + struct.pack("<f", float("nan")), "not finite"),
        (lambda data: data[:-4] + struct.pack("<f", float("inf")), "not finite"),
        (lambda data: struct.pack("<Q", 2) + b"{}", "holds no tensors"),
        (lambda data: struct.pack("<Q", 2) + b"[]", "is not safetensors"),
    ],
)
def test_a_broken_state_is_refused_with_what_is_wrong(change, sentence: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadState, match=sentence):
        SharedState.from_bytes(change(a_state().to_bytes()))


@given(st.data())
def test_whatever_the_header_says_it_is_refused_or_read(data: st.DataObject) -> None:
    entries = {
        data.draw(st.text(max_size=4)): {
            "dtype": data.draw(st.sampled_from(["F32", "I64", "F16", ""])),
            "shape": data.draw(st.lists(st.integers(0, 1 << 41), max_size=3)),
            "data_offsets": data.draw(st.lists(st.integers(-1, 40), min_size=1, max_size=3)),
        }
        for _ in range(data.draw(st.integers(0, 3)))
    }
    header = msgspec.json.encode(entries)
    try:
        state = SharedState.from_bytes(struct.pack("<Q", len(header)) + header + bytes(40))
    except BadState as error:
        assert error.sentence.endswith(".")
        return
    assert state.layout.size == 10


def test_a_private_state_reads_back_and_counts_its_steps(tmp_path: Path) -> None:
    state = PrivateState(np.arange(6, dtype=np.float32), np.arange(3, dtype=np.float32), 40)
    state.write(tmp_path / "private")
    again = PrivateState.read(tmp_path / "private")
    assert again.hash == state.hash == blake3_hash((tmp_path / "private").read_bytes())
    assert (again.step, again.size) == (40, (tmp_path / "private").stat().st_size)
    empty = PrivateState.fresh(0, 2)
    empty.write(tmp_path / "empty")
    assert PrivateState.read(tmp_path / "empty").hash == empty.hash
    assert len({state.hash, empty.hash, PrivateState(state.optimizer, state.residual, 41).hash}) == 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda data: data[:-1], "its header says"),
        (lambda data: data[:-8] + (-1).to_bytes(8, "little", signed=True), "counts -1 steps"),
        (lambda data: data[:-12] + struct.pack("<f", float("nan")) + data[-8:], "not finite"),
        (lambda data: data.replace(b'"residual"', b'"residues"'), "does not hold optimizer, residual and step"),
    ],
)
def test_a_broken_private_state_is_refused(change, sentence: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    PrivateState(np.ones(6, dtype=np.float32), np.ones(3, dtype=np.float32), 40).write(tmp_path / "private")
    with pytest.raises(BadState, match=sentence):
        PrivateState.from_bytes(change((tmp_path / "private").read_bytes()))
