"""Text that comes in pieces becomes tokens that read as it: over tokenizers that put spaces where they like."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from shoal.gateway.encoding import Encoder, Unwritable
from shoal.gateway.text import Decoder, spelled
from shoal.models.tokenizers import ByteTokenizer, FileTokenizer, TextTokenizer
from shoal.protocol.engines import EnginePiece, PieceReader, pack
from shoal.protocol.messages import BadMessage

WORDS = ["the quick brown fox", "def f(x):\n    return x", "the lazy dog", "hello world, hello there", "naïve café ☕"]


def spaced() -> TextTokenizer:
    """A space before every text, as SentencePiece has it; bytes for what it does not know."""
    bytes_known = [f"<0x{number:02X}>" for number in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "</s>", *bytes_known], show_progress=False)
    tokenizer.train_from_iterator(WORDS * 3, trainer)
    return FileTokenizer(tokenizer, Path("spaced"), Path("spaced"))


def byte_level() -> TextTokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(WORDS * 3, trainer)
    return FileTokenizer(tokenizer, Path("bytes"), Path("bytes"))


TOKENIZERS = {"bytes": ByteTokenizer(), "byte level": byte_level(), "spaced": spaced()}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text("abde fghlo(:)\n ïé☕", min_size=1, max_size=60), cuts=st.lists(st.integers(0, 60), max_size=9))
def test_tokens_read_as_the_text_however_it_was_cut(name: str, text: str, cuts: list[int]) -> None:
    tokenizer = TOKENIZERS[name]
    before = tokenizer.encode("the quick").tolist()
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    encoder, reader = Encoder(tokenizer, before), Decoder(tokenizer.decode)
    said, tokens = reader.add(before), list(before)
    for number, (start, stop) in enumerate(itertools.pairwise(places), 2):
        more = list(encoder.add(text[start:stop], last=number == len(places)))
        tokens += more
        said += reader.add(more)
    said += reader.rest()
    assert said == tokenizer.decode(tokens) == tokenizer.decode(before) + text


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text("abde fghlo(:)\n ïé☕🐟", min_size=1, max_size=60))
def test_the_bytes_of_tokens_are_those_of_the_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    said = b"".join(tokenizer.bytes_of(token) for token in tokenizer.encode(text).tolist())
    assert said in (text.encode(), b" " + text.encode())


def test_tokens_that_are_no_text_and_a_part_of_a_character() -> None:
    ends = [
        (tokenizer, tokenizer.of_library().token_to_id(end))
        for tokenizer, end in zip(TOKENIZERS.values(), ("<|endoftext|>", "<|end|>", "</s>"), strict=True)
    ]
    assert [tokenizer.bytes_of(end) for tokenizer, end in ends] == [b"<|endoftext|>", b"<|end|>", b"</s>"]
    assert spelled(b" \xe2\x98", "bytes:") == "bytes: \\xe2\\x98" and spelled("☕".encode(), "bytes:") == "☕"


def test_a_stream_within_a_character_has_no_text() -> None:
    cup = ByteTokenizer().encode("☕").tolist()
    assert Encoder(ByteTokenizer(), cup).add("x") == (ord("x"),)
    with pytest.raises(Unwritable, match="within a character"):
        Encoder(ByteTokenizer(), cup[:2])


def test_what_no_token_says_is_refused_and_nothing_waits_for_ever() -> None:
    tokenizer = TOKENIZERS["byte level"]
    encoder = Encoder(tokenizer, [])
    assert encoder.add("<|end|>") == (), "the text of a special token is no text to the tokenizer"
    with pytest.raises(Unwritable, match="cannot write"):
        encoder.add("x" * 600)
    with pytest.raises(Unwritable, match="cannot write"):
        Encoder(tokenizer, []).add("<|end|>", last=True)


def test_pieces_come_out_of_a_stream_that_is_cut_anywhere() -> None:
    pieces = [EnginePiece(text="abc", tokens=(1, 2, 3)), EnginePiece(), EnginePiece(finish="stop")]
    data = b"".join(pack(piece, 1) for piece in pieces)
    for size in range(1, len(data) + 1):
        reader = PieceReader(1)
        found = [piece for at in range(0, len(data), size) for piece in reader.feed(data[at : at + size])]
        assert found == pieces
    with pytest.raises(BadMessage, match="was refused"):
        PieceReader(1).feed(b"\xff\xff\xff\xff")
    with pytest.raises(BadMessage):
        PieceReader(1).feed(b"\x00\x00\x00\x01\xc1")
