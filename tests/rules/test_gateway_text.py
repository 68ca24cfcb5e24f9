"""Tokens to text, piece by piece."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from shoal.gateway.text import Decoder, StopAt
from shoal.models.tokenizers import ByteTokenizer


@given(st.text(max_size=60), st.lists(st.integers(1, 5), max_size=200))
@example("000\x800" + "\U00010000" * 3, [1, 3, 3, 4, 4])  # no piece ends with a character
@example("\U0001f41f" * 12, [1] + [4] * 12)
def test_pieces_make_the_text(text: str, lengths: list[int]) -> None:
    tokens = ByteTokenizer().encode(text).tolist()
    decoder, out, at = Decoder(ByteTokenizer().decode), "", 0
    for length in [*lengths, *[1] * len(tokens)]:
        piece = decoder.add(tokens[at : at + length]) if tokens[at : at + length] else ""
        assert "\ufffd" not in piece or "\ufffd" in text
        out, at = out + piece, at + length
    assert out + decoder.rest() == text


def test_bytes_that_are_no_character_are_not_waited_for_for_ever() -> None:
    decoder = Decoder(ByteTokenizer().decode)
    said = [decoder.add([0xE2]) for _ in range(40)]
    assert "".join(said)
    assert decoder.add([65]).endswith("A")


@given(st.text("ab", max_size=40), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_a_text_ends_before_the_first_stop(text: str, stops: list[str], data: st.DataObject) -> None:
    ends = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    stop, out, at = StopAt(stops), "", 0
    while at < len(text):
        size = data.draw(st.integers(1, 5))
        out += stop.add(text[at : at + size])
        assert text.startswith(out)
        at += size
    first = min(text.find(one) + len(one) for one in stops if text.find(one) >= 0) if ends else None
    out += stop.rest()
    if first is None:
        assert out == text and not stop.stopped
    else:
        assert stop.stopped and out == text[: len(out)] and all(one not in out for one in stops)
