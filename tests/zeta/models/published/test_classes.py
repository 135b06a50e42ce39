"""The names of the classes are those of the head's rows, or the folder is refused by name."""

import pytest
import transformers as hf

from tests.zeta.models.published.encoders import ENCODERS
from tests.zeta.models.published.test_timm_vit import FREE
from tests.zeta.models.published.test_timm_vit import change as change_config
from tests.zeta.models.published.test_timm_vit import saved as saved_timm
from zeta.models.sources import read_config
from zeta.train.init_sources import open_weights


@pytest.fixture
def classifier(tmp_path):
    """A folder of transformers with a head of three classes."""
    config = hf.ViTConfig(**ENCODERS["vit"][1].to_diff_dict(), id2label=dict(enumerate("abc")))
    hf.ViTForImageClassification(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"0": "a", "1": "b"}, r"id2label .* names 2 classes \(0, 1\), but the head has 3 rows"),
        (dict(enumerate("abcdefg")), r"names 7 classes \(0, 1, 2, 3, 4, ...\)"),
        ({"1": "a", "5": "b", "7": "c"}, r"\(1, 5, 7\).*give the classes 0 to 2 one name each"),
        ({"a": 0, "b": 1, "c": 2}, r"names 3 classes \(a, b, c\)"),
        (["a", "b", "c"], "id2label is a list in config.json"),
        ("abc", "id2label is 'abc' in config.json"),
    ],
)
def test_names_of_other_classes_than_the_rows_of_the_head_are_refused(classifier, labels, message):
    change_config(classifier, id2label=labels)
    for refuse in (read_config, lambda path: open_weights(path, {})):
        with pytest.raises(ValueError, match=message):
            refuse(classifier)


def test_a_head_without_names_is_one_of_classes_all_the_same(classifier):
    change_config(classifier, id2label=None)
    info = read_config(classifier)["info"]
    assert (info["class_names"], info["targets"]) == (None, "label")


@pytest.mark.parametrize("named", [None, "ViTForImageClassification"])
def test_a_classifier_is_known_by_its_head_and_not_by_the_name_of_its_class(classifier, named):
    change_config(classifier, architectures=named)
    info = read_config(classifier)["info"]
    assert info["class_names"] == ["a", "b", "c"]
    assert info["imported"]["class"] == (named or "vit")


def test_a_class_that_is_no_name_is_refused(classifier):
    change_config(classifier, architectures=[7])
    with pytest.raises(ValueError, match=r"architectures is \[7\] in config.json"):
        read_config(classifier)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"label_names": ["one"]},
            r"label_names .* names 1 classes \(0\), but the head has 7 rows",
        ),
        ({"label_names": {"3": "three"}}, r"names 1 classes \(3\)"),
        ({"num_classes": 3}, "num_classes is 3 in config.json, but the head has 7 rows"),
        ({"num_classes": 0}, "num_classes is 0 in config.json, but the head has 7 rows"),
    ],
)
def test_classes_of_timm_are_those_of_the_head(tmp_path, changes, message):
    saved_timm(tmp_path, "vit_base_patch16_224", **FREE)
    change_config(tmp_path, label_names=list("abcdefg"))
    assert read_config(tmp_path)["info"]["class_names"] == list("abcdefg")
    change_config(tmp_path, **changes)
    for refuse in (read_config, lambda path: open_weights(path, {})):
        with pytest.raises(ValueError, match=message):
            refuse(tmp_path)
