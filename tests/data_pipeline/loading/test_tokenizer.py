"""Tokenizers: any text goes in and comes out, and a file that cannot be used is named."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.loading.tokenizer import ByteTokenizer, open_tokenizer

TEXTS = ("a cat", "naïve 世界 \U0001f600‍ ‮", "\0\n\t ", "ﷺ½", "x" * 3000)


@given(st.text())
def test_any_text_goes_through_bytes_unchanged(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_a_character_that_was_cut_is_marked():
    tokenizer = open_tokenizer("bytes")
    assert tokenizer.decode(tokenizer.encode("a世")[:3]) == "a\ufffd"


def test_a_file_needs_the_library_and_the_message_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"not installed: pip install 'zeta\[text\]'"):
        open_tokenizer(str(tmp_path / "other.json"))


def byte_level_file(folder, vocab_size=400, **settings):
    """A byte-level BPE trained here, with settings of the file changed."""
    library = pytest.importorskip("tokenizers")
    tokenizer = library.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["the cat sat on the mat", *TEXTS], vocab_size=vocab_size)
    content = json.loads(tokenizer.to_str()) | settings
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path


def test_any_text_goes_through_a_byte_level_file_unchanged(tmp_path):
    tokenizer = open_tokenizer(str(byte_level_file(tmp_path)))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert max(ids) < tokenizer.vocab_size
    assert len(tokenizer.encode("the cat sat")) < len("the cat sat")


def test_a_file_that_truncates_or_pads_does_neither_here(tmp_path):
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    tokenizer = open_tokenizer(str(byte_level_file(tmp_path, truncation=cut, padding=pad)))
    assert tokenizer.decode(tokenizer.encode("x" * 3000)) == "x" * 3000
    assert len(tokenizer.encode("a cat")) < 10


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "bad.json"
    with pytest.raises(ValueError, match="cannot be read"):
        open_tokenizer(str(path))
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"bad.json is not a tokenizer.json"):
        open_tokenizer(str(path))
