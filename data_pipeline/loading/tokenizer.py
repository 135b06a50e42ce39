"""Tokenizers: they convert captions to token ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

BYTES = "bytes"


class Tokenizer(Protocol):
    """A converter of text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """Largest id plus one."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return all token ids of `text`."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`."""
        ...


class ByteTokenizer:
    """A tokenizer whose tokens are UTF-8 bytes: it takes any text and needs no file."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """Return the bytes of `text`."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the bytes; a character that was cut becomes U+FFFD."""
        return bytes(ids).decode("utf-8", "replace")


class FileTokenizer:
    """A tokenizer.json of the tokenizers library: the vocabularies of T5, Gemma, CLIP and others.

    Args:
        path: the file. Its truncation and padding are turned off: `data.text` decides what is
            cut, and cuts are counted.

    Raises:
        ValueError: the library is not installed, or the file is not a tokenizer.
    """

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise ValueError(
                f"data.text.tokenizer is {path}, but the library that reads it is not installed: "
                "pip install 'zeta[text]', or set data.text.tokenizer=bytes"
            ) from None
        try:
            content = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"data.text.tokenizer {path} cannot be read: {error}") from error
        try:
            self._library = Library.from_str(content)
        except Exception as error:  # the library has no type of its own for a bad file
            raise ValueError(
                f"data.text.tokenizer {path} is not a tokenizer.json: {error}"
            ) from error
        self._library.no_truncation()
        self._library.no_padding()
        self.vocab_size: int = max(self._library.get_vocab().values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, including the special tokens that the file adds."""
        ids: list[int] = self._library.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens."""
        text: str = self._library.decode(list(ids))
        return text


@lru_cache(maxsize=4)
def open_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer that `data.text.tokenizer` names.

    Raises:
        ValueError: the tokenizer cannot be read.
    """
    return ByteTokenizer() if name == BYTES else FileTokenizer(Path(name).expanduser())
