"""Bytes into frames and back, whatever the pieces in which they come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.transport.frames import (
    HEADER,
    KIND_MAX_BYTES,
    PAYLOAD_LIMITS,
    SMALL_BYTES,
    BrokenFraming,
    FrameReader,
    FrameType,
    Opening,
    frame,
    pack_opening,
    pack_refusal,
    unpack_opening,
    unpack_refusal,
)

_stream_frames = st.tuples(
    st.sampled_from([FrameType.DATA, FrameType.BODY, FrameType.END]),
    st.integers(1, 2**64 - 1),
    st.one_of(st.binary(min_size=1, max_size=50), st.binary(min_size=1000, max_size=3000)),
)
_link_frames = st.tuples(
    st.sampled_from([FrameType.PING, FrameType.PONG]), st.just(0), st.binary(min_size=8, max_size=8)
)


@given(
    frames=st.lists(st.one_of(_stream_frames, _link_frames), max_size=12),
    cuts=st.lists(st.integers(1, 700), min_size=1),
)
def test_frames_survive_being_cut_anywhere(frames: list[tuple[FrameType, int, bytes]], cuts: list[int]) -> None:
    data = b"".join(frame(*one) for one in frames)
    reader, got, position, turn = FrameReader(), [], 0, 0
    while position < len(data):
        size = cuts[turn % len(cuts)]
        got += reader.feed(data[position : position + size])
        position += size
        turn += 1
    assert got == [(int(kind), stream, payload) for kind, stream, payload in frames]
    assert all(isinstance(payload, bytes) for _, _, payload in got)


def test_a_frame_that_comes_byte_by_byte_costs_no_more_than_its_size() -> None:
    reader, payload = FrameReader(), bytes(range(256)) * 40
    got = []
    for byte in frame(FrameType.DATA, 1, payload):
        got += reader.feed(bytes([byte]))
        assert len(reader._parts) <= 65
    assert got == [(FrameType.DATA, 1, payload)]


@given(kind=st.integers(0, 255), stream=st.integers(0, 2**64 - 1), length=st.integers(0, 2**32 - 1))
def test_a_header_is_judged_before_anything_is_stored(kind: int, stream: int, length: int) -> None:
    limits = PAYLOAD_LIMITS.get(kind)
    whole_link = kind in (FrameType.PING, FrameType.PONG, FrameType.RETIRE, FrameType.CLOSE)
    right = limits is not None and limits[0] <= length <= limits[1] and whole_link == (stream == 0)
    header = HEADER.pack(kind, stream, length)
    if right:
        assert FrameReader().feed(header) == ([(kind, stream, b"")] if length == 0 else [])
    else:
        with pytest.raises(BrokenFraming):
            FrameReader().feed(header)


@given(st.binary(max_size=4000))
def test_any_bytes_are_frames_or_broken_framing(data: bytes) -> None:
    try:
        FrameReader().feed(data)
    except BrokenFraming:
        pass


_kinds = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=KIND_MAX_BYTES)


@given(
    kind=_kinds,
    reply=st.integers(0, 2**64 - 1),
    credit=st.integers(0, 2**32 - 1),
    size=st.one_of(st.integers(0, 100), st.integers(SMALL_BYTES - 1, SMALL_BYTES + 1)),
)
def test_openings_come_back_as_they_were(kind: str, reply: int, credit: int, size: int) -> None:
    opening, start = Opening(kind, reply, credit, size), bytes(min(size, SMALL_BYTES))
    packed = pack_opening(opening, start)
    assert unpack_opening(packed) == (opening, start)
    low, high = PAYLOAD_LIMITS[FrameType.OPEN]
    assert low <= len(packed) <= high


@given(st.binary(min_size=PAYLOAD_LIMITS[FrameType.OPEN][0], max_size=200))
def test_any_bytes_are_an_opening_or_broken_framing(payload: bytes) -> None:
    try:
        opening, start = unpack_opening(payload)
    except BrokenFraming:
        return
    assert pack_opening(opening, start) == payload


@given(code=st.text(max_size=40), sentence=st.text(max_size=2000))
def test_refusals_fit_their_frame_and_hold_nothing_a_terminal_acts_on(code: str, sentence: str) -> None:
    packed = pack_refusal(code, sentence)
    low, high = PAYLOAD_LIMITS[FrameType.REFUSE]
    assert low <= len(packed) <= high
    got_code, got = unpack_refusal(packed)
    assert got_code and got_code.isprintable() and got.isprintable()
    if sentence.isprintable() and len(sentence.encode("utf-8", "replace")) <= 600:
        assert got == sentence


@given(st.binary(min_size=1, max_size=617))
def test_any_bytes_can_be_read_as_a_refusal(payload: bytes) -> None:
    code, sentence = unpack_refusal(payload)
    assert code.isprintable() and sentence.isprintable()
