"""Shards in object stores: moto's S3 and an emulator of Google's, and what goes wrong there."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.loading.loader import PackLoader
from data_pipeline.plan.plan import Plan
from data_pipeline.shards import remote
from data_pipeline.shards.images.smaller import Shrinking
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.retry import PermanentError
from data_pipeline.shards.shrinking.shrink import shrink_shards
from data_pipeline.shards.stores import RemoteError
from launch.cli import entry_point
from tests.data_pipeline.loading.test_loader import content
from tests.data_pipeline.object_stores import (
    AWS,
    Store,
    change,
    demand_keys,
    forget_stores,
    gs_store,
    s3_store,
    user_without_permissions,
)
from tests.data_pipeline.shard_fixtures import labelled, write_shard
from tests.data_pipeline.synthetic import config

pytestmark = pytest.mark.slow  # importing the clients alone takes seconds


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number in range(3):
        write_shard(tmp_path / "near" / f"{number}.tar", labelled(12, first=20 * number))
    (tmp_path / "near/classes.json").write_text('["a", "b", "c"]')
    return tmp_path / "near"


@pytest.fixture
def s3(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for package in ("s3fs", "moto"):
        pytest.importorskip(package)
    monkeypatch.setenv("ZETA_INDEX_DIR", str(tmp_path / "index"))
    with s3_store(monkeypatch) as store:
        store.put(shards)
        yield store


@pytest.fixture
def gs(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for package in ("gcsfs", "gcp_storage_emulator"):
        pytest.importorskip(package)
    monkeypatch.setenv("ZETA_INDEX_DIR", str(tmp_path / "index"))
    with gs_store(monkeypatch) as store:
        store.put(shards)
        yield store


@pytest.fixture(params=["s3", "gs"])
def store(request: pytest.FixtureRequest) -> Store:
    return request.getfixturevalue(request.param)


def packs_of(spec: str | Path, cache: Path, state: dict | None = None, steps: int = 4) -> tuple:
    """Return the packs of some steps, and the state after them."""
    settings = config(workers=0, cache_dir=str(cache), cache_gb=1, read_deadline_s=20)
    loader = PackLoader(Plan(Manifest.open(spec), settings, num_lanes=2))
    found = list(itertools.islice(loader.steps(state), steps))
    return [found], loader.state_after(found[-1].step)


def test_a_bucket_is_indexed_read_and_resumed_like_a_folder(store, shards, tmp_path):
    far, near = index_shards(store.url()), index_shards(shards)
    assert np.array_equal(far.samples, near.samples)
    assert (far.fingerprint, far.class_names) == (near.fingerprint, ("a", "b", "c"))
    store.faults.extend(["reset", 503, 500])
    first, state = packs_of(store.url(), tmp_path / "cache")
    second, _ = packs_of(store.url("*.tar"), tmp_path / "cache", state)
    expected, _ = packs_of(shards, tmp_path / "unused", steps=8)
    assert content([first[0] + second[0]]) == content(expected)
    assert not store.faults


def test_a_bucket_is_shrunk_like_a_folder(s3, shards, tmp_path):
    far = shrink_shards(s3.url(), tmp_path / "far", Shrinking(16))
    near = shrink_shards(shards, tmp_path / "small", Shrinking(16))
    for name in ("0.tar", "1.tar", "2.tar", "classes.json"):
        assert (tmp_path / "far" / name).read_bytes() == (tmp_path / "small" / name).read_bytes()
    assert far.reports == near.reports


@pytest.mark.parametrize("fault", [500, 503, "reset", "SlowDown"])
def test_what_passes_is_tried_again_until_the_deadline(s3, fault):
    s3.faults.extend([fault, fault])
    assert len(remote.read_range(s3.url("0.tar"), 512, 100)) == 100
    s3.always = fault
    with pytest.raises(RemoteError, match="reading at byte 512") as error:
        remote.read_range(s3.url("0.tar"), 512, 100, deadline_s=0.5)
    assert error.value.filename == s3.url("0.tar")


def message_at_once(url: str) -> str:
    """Return the message of a read that must fail without retries."""
    start = time.monotonic()
    with pytest.raises(PermanentError) as error:
        remote.read_range(url, 512, 100, deadline_s=60)
    assert time.monotonic() - start < 20
    assert error.value.filename == url
    return str(error.value.strerror)


def test_a_missing_object_or_bucket_is_said_at_once(store):
    assert message_at_once(store.url("9.tar")) == "no such object, reading at byte 512"
    with pytest.raises(PermanentError, match="no such object"):
        remote.stat(store.url("9.tar"))
    assert message_at_once(f"{store.protocol}://elsewhere/0.tar").startswith("no such ")


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({}, "InvalidAccessKeyId: "),
        ({"AWS_ACCESS_KEY_ID": "nobody's"}, "SignatureDoesNotMatch: "),
        ({"may": "nothing"}, "AccessDenied: "),
        (dict.fromkeys(list(AWS)[:2], ""), "Unable to locate credentials"),
    ],
    ids=["wrong key", "wrong secret", "no permission", "no key"],
)
def test_credentials_that_do_not_serve_are_said_at_once_with_the_fix(
    s3, monkeypatch, variables, reason
):
    nobody = user_without_permissions()
    if "may" in variables:
        variables = nobody
    elif variables.get("AWS_ACCESS_KEY_ID"):
        variables = {"AWS_ACCESS_KEY_ID": nobody["AWS_ACCESS_KEY_ID"]}
    demand_keys(s3)
    change(monkeypatch, variables)
    said = message_at_once(s3.url("0.tar"))
    assert said.startswith(f"access denied ({reason}")
    assert "reading at byte 512; give credentials that may read it (AWS_PROFILE, or" in said
    for spec in (s3.url(), s3.url("{0..2}.tar")):
        with pytest.raises(PermanentError, match=rf"access denied \({reason}.*give credentials"):
            index_shards(spec)


def test_an_expired_token_is_said_at_once_and_another_one_continues(s3, tmp_path):
    index_shards(s3.url())
    _, state = packs_of(s3.url(), tmp_path / "cache", steps=2)
    s3.always = "ExpiredToken"
    forget_stores("s3")  # and its listings, which are good for half a minute
    said = message_at_once(s3.url("0.tar"))
    assert said.startswith("access denied (ExpiredToken: as told)")
    with pytest.raises(PermanentError, match=r"access denied \(ExpiredToken: as told\)"):
        remote.stat(s3.url("0.tar"))
    assert said.endswith(
        "the credentials have expired: renew them, and type the same command again"
    )
    s3.always = None
    resumed, _ = packs_of(s3.url(), tmp_path / "cache", state, steps=2)
    assert [step.step for step in resumed[0]] == [2, 3]


@pytest.mark.parametrize("status", [401, 403])
def test_google_without_access_is_said_at_once_with_the_fix(gs, status):
    gs.always = status
    said = message_at_once(gs.url("0.tar"))
    assert said.startswith("access denied (")
    assert "gcloud auth application-default login" in said


def test_a_shard_that_goes_away_is_refused_by_name(store):
    index_shards(store.url("{0..2}.tar"))
    store.remove("1.tar")
    with pytest.raises(ValueError, match=r"1\.tar cannot be read: no such object"):
        Manifest.open(store.url("{0..2}.tar"))


def test_a_command_prints_one_message_and_writes_no_index(s3, monkeypatch, tmp_path, capfd):
    demand_keys(s3)
    change(monkeypatch, {})
    assert entry_point(["shards", "index", s3.url("{0..2}.tar")]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("zeta: error: access denied (")
    assert not list((tmp_path / "index").rglob("manifest*"))
