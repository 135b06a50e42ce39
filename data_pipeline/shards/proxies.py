"""The proxies that the environment names, as the clients of remote stores understand them."""

from __future__ import annotations

import os
import re
import urllib.request
from urllib.parse import urlsplit

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


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
