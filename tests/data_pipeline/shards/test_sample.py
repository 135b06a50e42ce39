from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from data_pipeline.shards.sample import Sample, SampleError, parse_labels, pick_image, split_name

part = st.text(st.sampled_from("ab._-Z\u00e9 "), min_size=1, max_size=8)


@given(st.lists(part, min_size=1, max_size=3).map("/".join))
def test_names_split_as_in_webdataset(name):
    key, suffix = base_plus_ext(name)
    ours = split_name(name)
    if key is None or key.endswith("/") or "/" in suffix or name.rpartition("/")[2][0] == ".":
        assert ours is None
    elif not name.startswith("__"):
        assert ours == (key, suffix.lower())


@pytest.mark.parametrize(
    ("suffixes", "image"),
    [
        (["cls", "jpg"], "jpg"),
        (["mask.png", "jpg"], "jpg"),
        (["png", "jpg"], "jpg"),
        (["mask.jpg", "png"], "png"),
        (["json", "final.jpeg"], "final.jpeg"),
        (["webp"], "webp"),
    ],
)
def test_the_image_of_a_sample_is_the_plainest_one(suffixes, image):
    assert pick_image(suffixes) == image
    assert pick_image(reversed(suffixes)) == image


def test_a_sample_without_an_image_says_so():
    with pytest.raises(SampleError, match="no image among its members"):
        _ = Sample("k", {"cls": b"1"}).image


@pytest.mark.parametrize(
    ("members", "names", "label"),
    [
        ({"cls": b"7"}, None, 7),
        ({"cls": b" 1\n"}, ("cat", "dog"), 1),
        ({"cls": b"dog\n"}, ("cat", "dog"), 1),
        ({"cls": b"1"}, ("1", "10", "2"), 1),
        ({"json": b'{"label": 3}'}, None, 3),
        ({"json": b'{"label": "cat"}'}, ("cat", "dog"), 0),
        ({"json": b'{"label": null}'}, None, None),
        ({"json": b'{"caption": "x"}'}, None, None),
        ({"cls": b"2", "json": b'{"label": 3}'}, None, 2),
        ({}, None, None),
    ],
)
def test_labels_are_read_from_cls_or_json(members, names, label):
    assert Sample("k", members).labels(names) == (None if label is None else (label,))


@pytest.mark.parametrize(
    ("members", "names", "labels"),
    [
        ({"cls": b"[3, 17, 3]"}, None, (3, 17)),
        ({"cls": b'["dog", 0]'}, ("cat", "dog"), (1, 0)),
        ({"cls": b"3 17\n5"}, None, (3, 17, 5)),
        ({"cls": b"3, 17,5"}, None, (3, 17, 5)),
        ({"cls": b"[]"}, None, ()),
        ({"cls": b"[x]"}, ("[x]", "y"), (0,)),
        ({"json": b'{"label": [1, 0]}'}, None, (1, 0)),
        ({"json": b'{"labels": ["dog", "cat"]}'}, ("cat", "dog"), (1, 0)),
        ({"json": b'{"labels": []}'}, None, ()),
        ({"json": b'{"labels": {"x": 1}, "caption": "y"}'}, None, None),
        ({"json": b'{"labels": ["shoe"], "caption": "y"}'}, None, None),
        ({"json": b'{"label": 2, "labels": [0, 1]}'}, None, (2,)),
    ],
)
def test_lists_of_labels_are_read_from_cls_or_json(members, names, labels):
    assert Sample("k", members).labels(names) == labels


@pytest.mark.parametrize(
    ("value", "names", "reason"),
    [
        (b"dog", None, "'dog' is a name, but there is no classes.json"),
        (b"cow", ("cat", "dog"), "'cow' is a name that is not in classes.json"),
        (b"2", ("cat", "dog"), "label 2 is above the last class, 1"),
        (b"-1", None, "is a name"),
        (b"", None, "is a name"),
        (b"99999999999999", None, "is a name"),
        (b"4294967296", None, "above the last class"),
        (b"\xff", None, "not UTF-8"),
        (b"[1, 2", None, "is not a JSON list"),
        (b"[" * 100_000, None, "is not a JSON list"),
        (b"[1, 2.5]", None, "is a float"),
        (b"[[1]]", None, "is a list"),
        (b"[true]", None, "is a bool"),
        (b"1 2 9", ("a", "b", "c"), "label 9 is above the last class, 2"),
        (b'["cow"]', ("cat", "dog"), "'cow' is a name that is not in classes.json"),
    ],
)
def test_a_label_that_means_no_class_is_refused_with_a_reason(value, names, reason):
    with pytest.raises(SampleError, match=reason):
        parse_labels(value, names)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"label": ', "json cannot be read"),
        (b'["label"]', "not an object"),
        (b'{"label": true}', "is a bool"),
        (b'{"label": {"a": 1}}', "is a dict"),
        (b'{"label": [[1]]}', "is a list"),
        (b'{"label":' + b"[" * 100_000, "json cannot be read"),
        (b'\xff{"label": 1}', "json cannot be read"),
    ],
)
def test_json_that_holds_no_label_is_refused_with_a_reason(content, reason):
    with pytest.raises(SampleError, match=reason):
        Sample("k", {"json": content}).labels(None)


def test_captions_hold_any_unicode_and_nothing_else():
    text = "naïve 世界 \U0001f600 \u202e"
    assert Sample("k", {"txt": text.encode()}).caption == text
    assert Sample("k", {"json": b'{"caption": "x"}'}).caption == "x"
    assert Sample("k", {"json": b'{"caption": 1}'}).caption is None
    assert Sample("k", {"jpg": b""}).caption is None
    assert Sample("k", {"txt": b" \n"}).caption is None
    assert Sample("k", {"json": b'{"caption": ""}'}).caption is None
    assert Sample("k", {"txt": b"a", "json": b'{"caption": "b"}'}).caption == "a"
    with pytest.raises(SampleError, match="caption is not valid Unicode"):
        _ = Sample("k", {"json": b'{"caption": "\\ud800"}'}).caption
    with pytest.raises(SampleError, match=r"caption is not UTF-8 \(byte 2\)"):
        _ = Sample("k", {"txt": b"ab\xff"}).caption


@pytest.mark.parametrize(
    ("members", "label"),
    [
        ({"20.30.jpg": b"", "20.30.cls": b"1"}, (1,)),  # a key with dots
        ({"input.jpg": b"", "output.cls": b"2"}, (2,)),
        ({"a.jpg": b"", "a.cls": b"3", "b.jpg": b"", "b.cls": b"4"}, (3,)),
        ({"jpg": b"", "a.cls": b"3", "b.cls": b"4"}, None),  # nobody can tell which
        ({"jpg": b"", "meta.json": b'{"label": 5}'}, None),
        ({"v2.jpg": b"", "v2.json": b'{"label": 5}'}, (5,)),
    ],
)
def test_the_only_label_beside_the_only_image_is_its_label(members, label):
    assert Sample("k", members).labels(None) == label


def test_the_caption_of_a_key_with_dots_is_read():
    assert Sample("photo", {"v2.jpg": b"", "v2.txt": b"a cat"}).caption == "a cat"


def test_a_label_of_a_million_names_ends_soon_with_its_reason():
    names = tuple(f"class {n}" for n in range(21_000))
    many = ("[" + ",".join(['"class 20999"'] * 60_000) + "]").encode()
    with pytest.raises(SampleError, match="60000 labels; an image has at most"):
        parse_labels(many, names)
    with pytest.raises(SampleError, match="bytes; at most"):
        parse_labels(b"x" * 2**21, names)
