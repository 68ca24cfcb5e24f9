"""Updates as bytes: what is kept, how it is read back, and what is refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.identity import blake3_hash
from shoal.protocol.training import Codec
from shoal.training.updates import (
    CHUNK,
    HEADER,
    BadUpdate,
    NotFinite,
    SparseRecord,
    decode_update,
    encode_update,
    update_bytes,
)

Floats = NDArray[np.float32]


def numbers(size: int, seed: int = 1) -> Floats:
    """The same numbers on every machine and with every version of NumPy: from integers alone."""
    state = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    state ^= state >> np.uint64(31)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    state ^= state >> np.uint64(27)
    return ((state >> np.uint64(40)).astype(np.float32) - np.float32(1 << 23)) * np.float32(2.0**-30)


sizes = st.sampled_from([1, 7, 63, 64, 65, 4095, 4096, 4097, 3 * 4096 + 130])
keeps = st.sampled_from([8, 64, 256])


@given(sizes, st.integers(0, 1000), st.sampled_from(list(Codec)), keeps)
def test_an_update_is_as_long_as_announced_and_reads_back_into_the_same_bytes(
    size: int, seed: int, codec: Codec, keep: int
) -> None:
    flat = numbers(size, seed)
    data = encode_update(flat, codec, keep)
    assert len(data) == update_bytes(codec, size, keep)
    assert data == encode_update(flat.copy(), codec, keep)
    update = decode_update(data, codec, size, keep)
    assert update.size == size and update.dense().dtype == np.float32
    assert encode_update(update.dense(), codec, keep) == data or codec is not Codec.NONE


@given(sizes, st.integers(0, 1000))
def test_none_is_exact_and_int8_is_off_by_half_a_level(size: int, seed: int) -> None:
    flat = numbers(size, seed)
    assert decode_update(encode_update(flat, Codec.NONE), Codec.NONE, size).dense().tobytes() == flat.tobytes()
    back = decode_update(encode_update(flat, Codec.INT8), Codec.INT8, size).dense()
    for start in range(0, size, CHUNK):
        chunk = flat[start : start + CHUNK]
        assert np.abs(back[start : start + CHUNK] - chunk).max() <= np.abs(chunk).max() / 127 * 0.5001


@given(sizes, st.integers(0, 1000), keeps, st.booleans())
def test_sparse2_keeps_the_largest_of_each_chunk_equal_ones_by_lowest_index(
    size: int, seed: int, keep: int, coarse: bool
) -> None:
    flat = numbers(size, seed)
    if coarse:  # many ties
        flat = np.round(flat * 512) / np.float32(512)
    update = decode_update(encode_update(flat, Codec.SPARSE2, keep), Codec.SPARSE2, size, keep)
    assert update.indices is not None
    for start in range(0, size, CHUNK):
        chunk = flat[start : start + CHUNK]
        k = SparseRecord(len(chunk), keep.bit_length() - 1).k
        expected = sorted(sorted(range(len(chunk)), key=lambda at: (-abs(chunk[at]), at))[:k])
        mine = (update.indices >= start) & (update.indices < start + CHUNK)
        assert (update.indices[mine] - start).tolist() == expected
        assert (np.signbit(update.values[mine]) == np.signbit(chunk[expected])).all()
        assert len(set(np.abs(update.values[mine]).tolist())) <= 2


def test_a_kept_value_costs_ten_and_a_half_bits() -> None:
    assert SparseRecord(CHUNK, 6).fields[3] == 84
    assert 8 * 84 / 64 == 10.5


def test_two_magnitudes_keep_most_of_what_the_largest_values_hold() -> None:
    flat = np.random.default_rng(0).standard_normal(64 * CHUNK).astype(np.float32)
    update = decode_update(encode_update(flat, Codec.SPARSE2), Codec.SPARSE2, flat.size)
    assert update.indices is not None
    kept = float((flat[update.indices] ** 2).sum())
    lost = float(((flat[update.indices] - update.values) ** 2).sum())
    assert lost < 0.02 * kept


def test_huge_and_tiny_numbers_stay_finite_and_in_order() -> None:
    largest = np.finfo(np.float32).max
    flat = np.array([largest, -largest, 1e-45, 0.0, -0.0, 1.0] * 20, dtype=np.float32)
    for codec in Codec:
        assert np.isfinite(decode_update(encode_update(flat, codec), codec, flat.size).dense()).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_sent(bad: float) -> None:
    flat = numbers(5000)
    flat[4321] = bad
    for codec in Codec:
        with pytest.raises(NotFinite, match="diverged"):
            encode_update(flat, codec)


GOLDEN = {Codec.NONE: "a9027e2f9280bbb6", Codec.INT8: "9c479d4e8bfc2ffb", Codec.SPARSE2: "680613eeeb156b0d"}


@pytest.mark.parametrize("codec", list(Codec))
def test_the_bytes_are_those_of_every_other_machine(codec: Codec) -> None:
    """A change here changes the format: members of two versions would no longer agree on a state."""
    assert blake3_hash(encode_update(numbers(9000), codec)).hex()[:16] == GOLDEN[codec]


# --- what is refused -----------------------------------------------------------------------------------------------

SIZE = CHUNK + 100


def sparse() -> bytearray:
    return bytearray(encode_update(numbers(SIZE), Codec.SPARSE2))


@pytest.mark.parametrize("codec", list(Codec))
def test_a_truncated_or_longer_update_is_refused_with_both_lengths(codec: Codec) -> None:
    data = encode_update(numbers(SIZE), codec)
    for wrong in (data[:-1], data + b"\0", b"", data[:10]):
        with pytest.raises(BadUpdate, match=f"of {len(wrong)} bytes was refused.*takes {len(data)}"):
            decode_update(wrong, codec, SIZE)


@pytest.mark.parametrize("at", range(HEADER.size))
def test_every_byte_of_the_header_counts(at: int) -> None:
    data = sparse()
    data[at] ^= 1
    with pytest.raises(BadUpdate, match="first bytes do not say"):
        decode_update(bytes(data), Codec.SPARSE2, SIZE)


def test_an_update_of_another_model_is_refused() -> None:
    with pytest.raises(BadUpdate, match="refused"):
        decode_update(bytes(sparse()), Codec.SPARSE2, SIZE + 1)


@pytest.mark.parametrize(
    ("magnitudes", "sentence"),
    [
        (struct.pack("<HH", 0x3F80, 0x7F80), "not a finite number"),
        (struct.pack("<HH", 0x7FC0, 0x3F80), "not a finite number"),
        (struct.pack("<HH", 0xBF80, 0x3F80), "negative or not in order"),
        (struct.pack("<HH", 0x3F80, 0x3F00), "negative or not in order"),
    ],
)
def test_magnitudes_are_finite_positive_and_in_order(magnitudes: bytes, sentence: str) -> None:
    data = sparse()
    data[HEADER.size : HEADER.size + 4] = magnitudes
    with pytest.raises(BadUpdate, match=sentence):
        decode_update(bytes(data), Codec.SPARSE2, SIZE)


def test_places_are_marked_in_order_within_the_chunk_and_nowhere_else() -> None:
    low, high, values, _ = SparseRecord(CHUNK, 6).fields
    start = HEADER.size

    data = sparse()
    data[start + high : start + values] = bytes(values - high)
    with pytest.raises(BadUpdate, match="does not mark exactly 64 places"):
        decode_update(bytes(data), Codec.SPARSE2, SIZE)

    data = sparse()
    data[start + high : start + values] = b"\xff" * 8 + bytes(8)  # all in one bucket, low bits not ascending
    with pytest.raises(BadUpdate, match="out of order or out of range"):
        decode_update(bytes(data), Codec.SPARSE2, SIZE)

    last = SparseRecord(100, 6)  # two places among 100: buckets [0, 64) and [64, 128)
    assert last.k == 2
    start += 84
    data = sparse()
    data[start + low] = 0b10_111111 | 1  # low bits 63 and ...
    data[start + last.fields[0] : start + last.fields[1]] = (63 | 63 << 6).to_bytes(2, "little")
    data[start + last.fields[1]] = 0b0101  # one place in each bucket: 63 and 127, of 100
    with pytest.raises(BadUpdate, match="out of order or out of range"):
        decode_update(bytes(data), Codec.SPARSE2, SIZE)


def test_padding_is_zero() -> None:
    last = SparseRecord(100, 6)
    for field in range(3):
        data = sparse()
        end = HEADER.size + 84 + last.fields[field + 1] - 1
        data[end] |= 0x80
        with pytest.raises(BadUpdate, match="padding|mark exactly"):
            decode_update(bytes(data), Codec.SPARSE2, SIZE)


def test_dense_codecs_refuse_what_is_not_finite() -> None:
    data = bytearray(encode_update(numbers(SIZE), Codec.NONE))
    data[HEADER.size + 400 : HEADER.size + 404] = struct.pack("<f", np.nan)
    with pytest.raises(BadUpdate, match="a value at 100 is not a finite number"):
        decode_update(bytes(data), Codec.NONE, SIZE)
    data = bytearray(encode_update(numbers(SIZE), Codec.INT8))
    data[HEADER.size + 4 : HEADER.size + 8] = struct.pack("<f", np.inf)
    with pytest.raises(BadUpdate, match="scale of a chunk at 1 is not"):
        decode_update(bytes(data), Codec.INT8, SIZE)
    data = bytearray(encode_update(numbers(SIZE), Codec.INT8))
    data[HEADER.size + 4 : HEADER.size + 8] = struct.pack("<f", -1.0)
    with pytest.raises(BadUpdate, match="negative"):
        decode_update(bytes(data), Codec.INT8, SIZE)
    data = bytearray(encode_update(numbers(SIZE), Codec.INT8))
    data[-1] = 0x80
    with pytest.raises(BadUpdate, match="-128"):
        decode_update(bytes(data), Codec.INT8, SIZE)


@given(st.sampled_from(list(Codec)), st.data())
def test_whatever_the_bytes_they_are_refused_or_give_finite_numbers_in_their_places(
    codec: Codec, data: st.DataObject
) -> None:
    encoded = bytearray(encode_update(numbers(SIZE), codec))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(HEADER.size, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        update = decode_update(bytes(encoded), codec, SIZE)
    except BadUpdate as error:
        assert error.sentence.endswith(".")
        return
    assert np.isfinite(update.values).all()
    if update.indices is not None:
        assert (np.diff(update.indices) > 0).all()
        assert update.indices[0] >= 0 and update.indices[-1] < SIZE
