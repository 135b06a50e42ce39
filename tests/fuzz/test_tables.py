"""Tables of images, CSV and JSON lines, up to the labels in the shards that are built of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.shards.sources.read import open_source
from tests.data_pipeline.shard_fixtures import jpeg
from tests.mutate import mutated_bytes, mutated_text_of_json, outcome

COUNT = 200
pytestmark = pytest.mark.filterwarnings("ignore:.* row")
ROWS = [
    ("0.jpg", "cat", "a"),
    ("sub/1.jpg", "dog", "b, c"),
    ("2.jpg", "cat", 'd "e"'),
    ("3.jpg", "owl", "é"),
]
CSV = """path,label,caption
0.jpg,cat,a
sub/1.jpg,dog,"b, c"
2.jpg,cat,"d ""e""\"
3.jpg,owl,é
""".encode()
JSONL = [{"path": path, "label": label, "caption": caption} for path, label, caption in ROWS]
CORPUS = [
    b"", b"\n", b"\0", b"\xff\xfe", b"path", b"path,label", b"path,label\n",
    b"path,path\n0.jpg,0.jpg\n",
    b"path,label\n/etc/passwd,a\n0.jpg,b\n", b"path,label\n../../x.jpg,a\n0.jpg,b\n",
    b"path,label\n0.jpg,nan\n2.jpg,1\n", b"path,label\n0.jpg,1.5\n2.jpg,1\n",
    b"path,label\n0.jpg,None\n2.jpg,1\n",
    b"path,label\n0.jpg," + b"9" * 5000 + b"\n", b"path,caption\n0.jpg," + b"x" * 200_000 + b"\n",
    b'path,label\n"0.jpg,a\n2.jpg,b\n', b"path,label\n0.jpg,a\n0.jpg,b\n",
    b"path,label\n\x00.jpg,a\n",
    b"path,label\n" + b"a" * 5000 + b".jpg,a\n", b"path,label\nsub,a\n0.jpg,b\n",
    b'path,label\n0.jpg,"a\nb"\n2.jpg,1\n', b'path,"a\nb"\n0.jpg,1\n',
    b"x" * 100_000 + b"\n0.jpg\n",
    b'path,label\n"a\nb.jpg",1\n', b'path,label\n0.jpg,"1\n.5"\n',
]  # fmt: skip
LINES = [
    b"5", b"null", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"path": 5, "label": "a"}',
    b'{"path": "0.jpg", "label": ' + b"9" * 5000 + b"}", b'{"path": "0.jpg", "label": [[]]}',
    b'{"path": "0.jpg", "label": NaN}', b'{"path": "0.jpg", "label": 1e999}',
    b'{"path": "\\ud800.jpg", "label": 1}',
    b'{"path": "0.jpg", "label": true}', b'{"path": "0.jpg", "Label": 1, "label": 2}',
    b'{"path": "/dev/zero", "label": 1}',
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    box = tmp_path_factory.mktemp("fuzz") / "photos"
    for number, (name, _, _) in enumerate(ROWS):
        (box / name).parent.mkdir(parents=True, exist_ok=True)
        (box / name).write_bytes(jpeg(20, 30, number))
    (box.parent / "x.jpg").write_bytes(jpeg())
    return box


def listed(table: Path) -> list[tuple[str, dict[str, object]]]:
    return [(sample.key, dict(sample.members)) for sample in open_source(table).samples]


def tried(photos: Path, table: Path, contents: list[bytes]) -> None:
    """Hold that each content of a table lists files of its folder only, or is refused by line."""
    inside = {(photos / name).resolve() for name, _, _ in ROWS}
    for content in contents:
        table.write_bytes(content)
        found = outcome(lambda: listed(table), photos)
        if isinstance(found, str):
            assert str(table) in found or str(photos) in found, (content[:200], found)
            continue
        keys = [key for key, _ in found]
        assert len(set(keys)) == len(keys)
        for _, members in found:
            files = [part for part in members.values() if not isinstance(part, bytes)]
            assert {Path(part.path).resolve() for part in files} <= inside, content[:200]
    table.unlink()


def test_a_damaged_csv_is_refused_by_line_or_lists_files_of_its_folder(photos):
    tried(photos, photos / "t.csv", [*CORPUS, *mutated_bytes(CSV, COUNT, 0)])


def test_damaged_json_lines_are_refused_by_line_or_list_files_of_their_folder(photos):
    lines = [json.dumps(row).encode() for row in JSONL]
    forms = [b"\n".join([*lines[:2], line, *lines[2:]]) for line in LINES]
    forms += mutated_bytes(b"\n".join(lines), COUNT, 1)
    for form in mutated_text_of_json(JSONL[1], COUNT, 2):
        forms.append(b"\n".join([lines[0], form.replace(b"\n", b" "), *lines[2:]]))
    tried(photos, photos / "t.jsonl", forms)
