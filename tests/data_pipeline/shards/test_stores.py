"""What the errors of the clients of stores mean: whether a retry can help, and what to do."""

from __future__ import annotations

import errno

import pytest

from data_pipeline.shards.retry import PermanentError
from data_pipeline.shards.stores import RemoteError, open_store, translated


class ClientError(Exception):
    """An error as botocore raises it."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"An error occurred ({code})")
        self.response = {
            "Error": {"Code": code, "Message": "words"},
            "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": {"retry-after": "3"}},
        }


class NoCredentialsError(Exception):
    """An error as botocore raises it without a key."""


class RefreshError(Exception):
    """An error as google.auth raises it."""


class HttpError(Exception):
    """An error as gcsfs raises it: its code may be text."""

    def __init__(self, code: int | str) -> None:
        super().__init__(f"words, {code}")
        self.code = code


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "number", "words"),
    [
        (FileNotFoundError("b/k"), errno.ENOENT, "no such object, reading"),
        (
            raised_from(FileNotFoundError(), ClientError(404, "NoSuchKey")),
            errno.ENOENT,
            "no such o",
        ),
        (raised_from(OSError(), ClientError(404, "NoSuchBucket")), errno.ENOENT, "no such bucket"),
        (raised_from(PermissionError(), ClientError(403, "AccessDenied")), errno.EACCES, "AWS_PRO"),
        (raised_from(OSError(22), ClientError(400, "InvalidToken")), errno.EACCES, "(InvalidToken"),
        (raised_from(OSError(22), ClientError(400, "ExpiredToken")), errno.EACCES, "renew them"),
        (NoCredentialsError("none found"), errno.EACCES, "access denied (none found), reading"),
        (RefreshError("token\nexpired"), errno.EACCES, "(token expired), reading"),
        (OSError("Forbidden: http://x\nwords"), errno.EACCES, "(Forbidden: http://x words)"),
        (HttpError("401"), errno.EACCES, "access denied (words, 401)"),
        (ValueError("Bad Request: k"), errno.EIO, "ValueError: Bad Request: k, reading"),
        (
            raised_from(OSError(), ClientError(301, "PermanentRedirect")),
            errno.EIO,
            "HTTP 301: Perm",
        ),
        (raised_from(OSError(22), ClientError(400, "InvalidRequest")), errno.EIO, "HTTP 400: Inv"),
    ],
)
def test_what_a_retry_cannot_help_is_permanent_and_says_why(error, number, words):
    found = translated(error, "s3://b/k", ", reading at byte 0")
    assert isinstance(found, PermanentError)
    assert (found.errno, found.filename) == (number, "s3://b/k")
    assert words in found.strerror
    assert ", reading at byte 0" in found.strerror


@pytest.mark.parametrize(
    "error",
    [
        raised_from(OSError(16), ClientError(503, "SlowDown")),
        raised_from(OSError(121), ClientError(500, "InternalError")),
        raised_from(FileNotFoundError("http://h/k"), ConnectionResetError()),
        raised_from(OSError(), ClientError(429, "TooManyRequests")),
        HttpError(502),
        TimeoutError("silence"),
    ],
)
def test_what_may_pass_is_tried_again(error):
    found = translated(error, "s3://b/k", "")
    assert isinstance(found, RemoteError)
    assert found.errno == errno.EIO


def test_the_pause_that_a_store_asks_for_is_found_in_its_answer():
    error = raised_from(OSError(), ClientError(503, "SlowDown"))
    assert translated(error, "s3://b/k", "").retry_after_s == 3


def test_each_protocol_has_its_own_fix():
    for url, words in (
        ("s3://b/k", "AWS_ENDPOINT_URL"),
        ("s3a://b/k", "AWS_ENDPOINT_URL"),
        ("gcs://b/k", "gcloud auth"),
        ("https://h/k", "or a URL that needs none"),
    ):
        assert words in translated(PermissionError(), url, "").strerror


def test_options_of_the_user_for_s3_are_kept(monkeypatch):
    pytest.importorskip("s3fs")
    from fsspec.config import conf

    monkeypatch.setitem(conf, "s3", {"config_kwargs": {"read_timeout": 7, "use_x": 1}})
    options = open_store("s3://b/k").config_kwargs
    assert (options["read_timeout"], options["use_x"], options["connect_timeout"]) == (7, 1, 30)
