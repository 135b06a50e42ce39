"""The stores behind fsspec (s3, gs, http and others): how each is opened, and what its errors mean.

Every client has errors of its own. Each becomes one `OSError` that says what happened and what to
do, and whether a retry can help: `RemoteError` if it can, `PermanentError` if not.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import urllib.request
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from data_pipeline.shards.retry import PermanentError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_STALL_S = 30.0
_FRESH_S = 30.0
"""Seconds for which a listing answers for its objects; older ones would hide that they changed."""
_PASSING = frozenset({408, 425, 429})
_NO_ACCESS = frozenset(
    (
        "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken",
        "RequestTimeTooSkewed", "SignatureDoesNotMatch", "TokenRefreshRequired",
    )
)  # fmt: skip
"""Codes of S3 about credentials; some come with HTTP 400."""
_NO_CREDENTIALS = frozenset(
    (
        "CredentialRetrievalError", "DefaultCredentialsError", "NoAuthTokenError",
        "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "RefreshError",
        "SSOTokenLoadError", "TokenRetrievalError", "UnauthorizedSSOTokenError",
    )
)  # fmt: skip
"""Errors of botocore and google.auth, by name: the clients need not be installed."""
_WRONG_REQUEST = frozenset(
    ("InvalidRegionError", "NoRegionError", "NotImplementedError", "ParamValidationError")
)
_HELP = {
    "s3": "give credentials that may read it (AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY), and AWS_ENDPOINT_URL if the store is not Amazon's",
    "gs": "give credentials that may read it (GOOGLE_APPLICATION_CREDENTIALS, or type `gcloud "
    "auth application-default login`)",
    "": "give credentials that may read it, or a URL that needs none",
}


class RemoteError(OSError):
    """The error of a remote read that may succeed when it is retried."""

    def __init__(self, number: int, what: str, url: str, retry_after_s: float = 0.0) -> None:
        super().__init__(number, what, url)
        self.retry_after_s = retry_after_s


def open_store(url: str) -> AbstractFileSystem:
    """Return the file system of a URL; fsspec keeps one per process and protocol.

    Raises:
        ValueError: a package is missing, or the protocol is unknown.
    """
    protocol = url.partition("://")[0]
    try:
        import fsspec

        if protocol in ("http", "https", "gs", "gcs"):  # the client of s3 does it by itself
            use_environment_proxies(url)
        store = fsspec.filesystem(protocol, **_options(protocol))
        if protocol in ("s3", "s3a"):
            store.retries = 1  # ours have one deadline for all
        return store
    except ImportError as error:
        raise ValueError(
            f"{url} needs more packages: pip install 'zeta[cloud]' ({error})"
        ) from error
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from error
    except Exception as error:  # credentials are looked for here, and each client has its own
        raise translated(error, url, "") from error


def use_environment_proxies(url: str) -> None:
    """Write the proxies of the environment as aiohttp reads them, before `url` is asked for.

    It knows ``http_proxy``, ``https_proxy`` and ``no_proxy``, in either case, but unlike curl and
    pip neither ``all_proxy`` nor addresses without a scheme.

    Raises:
        ValueError: its proxy is of a kind that is not supported, which aiohttp would only ignore.
    """
    found = urllib.request.getproxies_environment()
    asked = urlsplit(url)
    own = "http" if asked.scheme.lower() == "http" else "https"
    direct = bool(urllib.request.proxy_bypass(asked.hostname or ""))
    for scheme in ("http", "https"):
        name = scheme if found.get(scheme) else "all"
        address = found.get(name)
        if not address:
            continue
        if not _SCHEME.match(address):
            address = f"http://{address}"
        kind = urlsplit(address).scheme.lower()
        if kind != "http" and (scheme != own or direct):
            continue
        if kind != "http":
            raise ValueError(
                f"{name}_proxy names a proxy of the kind {kind}, which is not supported: set "
                f"{scheme}_proxy to one whose address begins with http://, or unset {name}_proxy"
            )
        os.environ[f"{scheme}_proxy"] = address


def translated(error: BaseException, url: str, at: str) -> OSError:
    """Return the error as a `RemoteError`, or as a `PermanentError` if a retry cannot help.

    Args:
        error: what the client of the store raised.
        url: the object, or the pattern that was listed.
        at: what was done, for the message: ", reading at byte 0".
    """
    causes = list(_causes(error))
    status = next(filter(None, map(_status, causes)), None)
    codes = {code for cause in causes for code in (_code(cause), type(cause).__name__)}
    if status == 404 or (isinstance(error, FileNotFoundError) and len(causes) == 1):
        kind = "bucket" if "NoSuchBucket" in codes else "object"
        return PermanentError(errno.ENOENT, f"no such {kind}{at}", url)
    reason = _reason(causes[-1])
    denied = bool(status in (401, 403) or codes & (_NO_ACCESS | _NO_CREDENTIALS))
    denied = denied or any(isinstance(cause, PermissionError) for cause in causes)
    if denied or reason.startswith("Forbidden"):  # gcsfs tells the status in words only
        return PermanentError(
            errno.EACCES, f"access denied ({reason}){at}; {_help(url, reason)}", url
        )
    name = f"HTTP {status}" if status else type(causes[-1]).__name__
    what = f"{name}: {reason}{at}"
    wrong = isinstance(error, ValueError) or codes & _WRONG_REQUEST
    if wrong or (status and 300 <= status < 500 and status not in _PASSING):
        return PermanentError(errno.EIO, what, url)
    return RemoteError(errno.EIO, what, url, max(map(_retry_after, causes)))


def _help(url: str, reason: str) -> str:
    if "xpired" in reason:
        return "the credentials have expired: renew them, and type the same command again"
    protocol = {"s3a": "s3", "gcs": "gs"}.get(url.partition("://")[0], url.partition("://")[0])
    return _HELP.get(protocol, _HELP[""])


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _response(error: BaseException) -> Mapping[str, Any]:
    """Return the answer that an error of botocore holds."""
    response = getattr(error, "response", None)
    return response if isinstance(response, Mapping) else {}


def _status(error: BaseException) -> int | None:
    """Return the HTTP status in an error of aiohttp, gcsfs or botocore."""
    if type(error).__module__ == "aiohttp.http_exceptions":
        return None  # its 400 stands for an answer that was cut or malformed, not for a status
    found = getattr(error, "status", None)  # `code` of aiohttp's is deprecated
    if found is None:
        found = getattr(error, "code", None)
    if found is None:
        found = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return int(found) if isinstance(found, int | str) and str(found).isdecimal() else None


def _code(error: BaseException) -> str:
    """Return the name that S3 gives its answer, such as NoSuchKey; "" of other errors."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def _reason(error: BaseException) -> str:
    """Return what the store said, in one line."""
    said = _response(error).get("Error", {})
    words = f"{said.get('Code')}: {said.get('Message')}" if said else str(error)
    return " ".join(words.split())[:200]


def _retry_after(error: BaseException) -> float:
    headers = getattr(error, "headers", None) or _response(error).get("ResponseMetadata", {}).get(
        "HTTPHeaders", {}
    )
    text = ""
    if hasattr(headers, "get"):
        text = str(headers.get("Retry-After") or headers.get("retry-after") or "")
    return float(text) if text.isdecimal() else 0.0


def _options(protocol: str) -> dict[str, Any]:
    """Return the options of a file system; a stalled connection counts as broken in all of them.

    A slow one that still progresses does not.
    """
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=_STALL_S, sock_read=_STALL_S)
        # Proxies of the environment, as curl and pip use them: often there is no other way out.
        return {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    if protocol in ("s3", "s3a"):
        from fsspec.config import conf

        known = {**conf.get("s3", {}), **conf.get(protocol, {})}
        ours = {
            "connect_timeout": _STALL_S,
            "read_timeout": _STALL_S,
            "retries": {"total_max_attempts": 1},
        }
        return {
            "config_kwargs": {**ours, **known.get("config_kwargs", {})},
            "listings_expiry_time": _FRESH_S,
        }
    if protocol in ("gs", "gcs"):
        # It logs each failure with a traceback, and we say it in one message.
        logging.getLogger("gcsfs").addHandler(logging.NullHandler())
        return {
            "access": "read_only",
            "listings_expiry_time": _FRESH_S,
            "session_kwargs": {"trust_env": True},
        }
    return {}
