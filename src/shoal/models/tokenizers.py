"""Text <-> token ids. No torch here."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from shoal.errors import BadInput

END_OF_DOCUMENT = "<|endoftext|>"
END_NAMES = (END_OF_DOCUMENT, "</s>", "<|end_of_text|>", "<eos>", "[SEP]", "<|im_end|>")
TOKENIZER_MAX_BYTES = 64 << 20
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Go along with a tokenizer; the first says how a document ends."""
OLDER_FILES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""Of which transformers makes a tokenizer where there is no tokenizer.json."""
SHOWN_CHARACTERS = 40
"""How much of a text a sentence shows that a tokenizer cannot encode."""


class BadTokenizer(BadInput):
    """A tokenizer file is missing, cannot be read, or cannot encode a text."""

    code = "SH-162"


class TextTokenizer(Protocol):
    vocabulary: int
    """How many ids there are, the end of a document included."""
    end: int | None
    """The id that stands between documents, where there is one."""

    def encode(self, text: str, *, special: bool = False) -> NDArray[np.uint32]:
        """`special`: with what the tokenizer adds around a text, if anything. Raises BadTokenizer."""
        ...

    def decode(self, ids: list[int]) -> str: ...

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for in UTF-8, which may be a part of a character; of a special token its name."""
        ...

    def of_library(self) -> Any:
        """The same as a Tokenizer of the tokenizers library."""
        ...

    def written(self, ids: list[int]) -> str:
        """The same with special tokens, as one who reads text alone has to be told them."""
        ...

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as `AutoTokenizer.from_pretrained` reads them."""
        ...


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level tokenizers (Radford et al., 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


BYTES = {character: byte for byte, character in enumerate(byte_alphabet())}
FALLBACK = re.compile("<0x([0-9A-F]{2})>")
"""A token that is a byte, in tokenizers that have characters otherwise."""
SPACE = "\u2581"
"""What stands for a space there."""


class ByteTokenizer:
    """A token is a byte of UTF-8; 256 ends a document."""

    vocabulary = 257
    end: int | None = 256

    def encode(self, text: str, *, special: bool = False) -> NDArray[np.uint32]:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def decode(self, ids: list[int]) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def bytes_of(self, token: int) -> bytes:
        return bytes((token,)) if token < 256 else END_OF_DOCUMENT.encode()

    def written(self, ids: list[int]) -> str:
        return self.decode(ids)

    def of_library(self) -> Any:
        made = Tokenizer(models.BPE(vocab=BYTES, merges=[]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
        made.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True)])
        return made

    def save(self, directory: Path) -> None:
        _save(self.of_library(), directory, END_OF_DOCUMENT)


class FileTokenizer:
    """A tokenizer of the tokenizers library, from a `tokenizer.json` or made of a checkpoint's older files."""

    def __init__(self, tokenizer: Any, source: Path, beside: Path) -> None:
        tokenizer.no_truncation()  # a file may ask for both: a text is what it is
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._source = source
        self._beside = beside
        """The directory in which its settings lie."""
        self._decoders = _decoders(tokenizer)
        self._added = frozenset(tokenizer.get_added_tokens_decoder())
        self.vocabulary: int = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        names = (_end_said(beside), *END_NAMES)
        known = (tokenizer.token_to_id(name) for name in names if name)
        self.end: int | None = next((token for token in known if token is not None), None)

    @classmethod
    def read(cls, file: Path) -> FileTokenizer:
        """Raises BadTokenizer."""
        try:
            if file.stat().st_size > TOKENIZER_MAX_BYTES:
                raise BadTokenizer(f"The tokenizer {file} is larger than {TOKENIZER_MAX_BYTES} bytes.")
            return cls(Tokenizer.from_str(file.read_text(encoding="utf-8")), file, file.parent)
        except OSError as error:
            raise BadTokenizer(f"The tokenizer {file} cannot be read: {error.strerror}.") from error
        except BadTokenizer:
            raise
        except Exception as error:
            raise BadTokenizer(f"{file} is not a tokenizer of the tokenizers library: {error}.") from error

    @classmethod
    def made_of(cls, directory: Path) -> FileTokenizer:
        """From a vocabulary and merges, or a SentencePiece model, as transformers understands them. Raises
        BadTokenizer."""
        from transformers import AutoTokenizer  # slow to load, and needed for old checkpoints alone

        try:
            made = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            return cls(Tokenizer.from_str(made.backend_tokenizer.to_str()), directory, directory)
        except Exception as error:
            there = ", ".join(name for name in OLDER_FILES if (directory / name).is_file())
            raise BadTokenizer(
                f"{directory} has no tokenizer.json, and transformers makes none of its {there}: "
                f"{textwrap.shorten(str(error), 300)}"
            ) from error

    def encode(self, text: str, *, special: bool = False) -> NDArray[np.uint32]:
        try:
            return np.asarray(self._tokenizer.encode(text, add_special_tokens=special).ids, dtype=np.uint32)
        except Exception as error:  # the library raises nothing narrower: a vocabulary may lack what it needs
            raise BadTokenizer(
                f"The tokenizer {self._source} cannot encode {text[:SHOWN_CHARACTERS]!r}: {error}. Give it a token for "
                "what it does not know, or name another."
            ) from error

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids)
        return text

    def bytes_of(self, token: int) -> bytes:
        name: str = self._tokenizer.id_to_token(token) or ""
        byte = FALLBACK.fullmatch(name) if "ByteFallback" in self._decoders else None
        if byte is not None:
            return bytes.fromhex(byte[1])
        if token in self._added:
            return name.encode()
        if "ByteLevel" in self._decoders and all(character in BYTES for character in name):
            return bytes(BYTES[character] for character in name)
        if self._decoders & {"ByteFallback", "Metaspace"}:  # decoded by itself it may lose a space
            return name.replace(SPACE, " ").encode()
        return self.decode([token]).encode()

    def of_library(self) -> Any:
        return self._tokenizer

    def written(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def save(self, directory: Path) -> None:
        _save(self._tokenizer, directory, None if self.end is None else self._tokenizer.id_to_token(self.end))
        for name in SETTINGS:
            if (self._beside / name).is_file():
                shutil.copyfile(self._beside / name, directory / name)


def _decoders(tokenizer: Any) -> frozenset[str]:
    """The kinds of steps by which its tokens become text."""
    if tokenizer.decoder is None:
        return frozenset()
    said = msgspec.json.decode(tokenizer.decoder.__getstate__())
    return frozenset(step["type"] for step in said.get("decoders", [said]))


def _end_said(directory: Path) -> str | None:
    """What a tokenizer's settings call the end of a document."""
    try:
        settings = msgspec.json.decode((directory / SETTINGS[0]).read_bytes()[:TOKENIZER_MAX_BYTES])
    except (OSError, msgspec.DecodeError, RecursionError):
        return None
    return special_token(settings, "eos_token") if isinstance(settings, dict) else None


def special_token(settings: Mapping[str, Any], name: str) -> str | None:
    """What tokenizer_config.json says a token is: its text, or an object that holds it."""
    token = settings.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _save(tokenizer: Any, directory: Path, end: str | None) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    ending = {} if end is None else {"eos_token": end, "bos_token": end, "unk_token": end}
    (directory / "tokenizer_config.json").write_bytes(msgspec.json.format(msgspec.json.encode({**settings, **ending})))


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("tokenizer.json", *OLDER_FILES))


def load_tokenizer(name: str) -> TextTokenizer:
    """`bytes`, a tokenizer.json, or a directory with one or with older files. Raises BadTokenizer."""
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        return FileTokenizer.read(file)
    if path.is_dir() and has_tokenizer(path):
        return FileTokenizer.made_of(path)
    raise BadTokenizer(
        f"There is no tokenizer at {file}; write `bytes`, or the path of a tokenizer.json or its directory."
    )
