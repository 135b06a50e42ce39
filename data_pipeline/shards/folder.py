"""Shard specs (folders, globs, braces, URLs) and the folders that they resolve to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import braceexpand

from data_pipeline.shards import remote
from data_pipeline.shards.remote import RemoteShard
from data_pipeline.shards.tar_reader import ShardFile

ShardSpec = str | Path | Sequence[str | Path]
"""A folder, a ``.tar`` file, a glob or a brace expansion, local or a URL, or a list of these."""

_STAT_THREADS = 16
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_COMPRESSED = (
    ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4", ".tar.lzma", ".tar.z",
    ".tgz", ".tbz", ".tbz2", ".txz", ".tzst",
)  # fmt: skip


class OtherSourceError(ValueError):
    """The error for a folder that holds the shards of another source."""


@dataclass(frozen=True)
class ShardFolder:
    """A local folder, or the directory part of URLs, that holds shards."""

    location: str
    """Path, or URL without a trailing slash."""

    @property
    def remote(self) -> bool:
        """True if the shards are behind a URL."""
        return remote.is_remote(self.location)

    @property
    def index(self) -> Path:
        """Local folder of the index files: beside local shards, in `index_root()` for URLs."""
        if not self.remote:
            return Path(self.location)
        protocol, _, rest = self.location.partition("://")
        return index_root() / protocol / quote(rest, safe="/")

    def shard(self, name: str) -> str:
        """Return the path or URL of a shard of this folder."""
        return f"{self.location}/{name}" if self.remote else str(Path(self.location) / name)

    def stat(self, names: Sequence[str]) -> Sequence[tuple[int, int]]:
        """Return (bytes, mtime in ns or stamp of the ETag) of each shard; OSError without one."""
        if not self.remote:
            found = [(Path(self.location) / name).stat() for name in names]
            return [(status.st_size, status.st_mtime_ns) for status in found]
        with ThreadPoolExecutor(_STAT_THREADS) as threads:
            return list(threads.map(remote.stat, map(self.shard, names)))

    def open(self, name: str) -> ShardFile | RemoteShard:
        """Open a shard for an index pass."""
        path = self.shard(name)
        return RemoteShard(path) if self.remote else ShardFile(path)

    def __str__(self) -> str:
        return self.location


def index_root() -> Path:
    """Return the folder of the indexes of remote shards: $ZETA_INDEX_DIR, or the user's cache."""
    if os.environ.get("ZETA_INDEX_DIR"):
        return Path(os.environ["ZETA_INDEX_DIR"]).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "zeta" / "index"


def folder_of(shard: str) -> tuple[ShardFolder, str]:
    """Return the folder and the file name of a shard, given by path or URL."""
    if remote.is_remote(shard):
        location, _, name = shard.rpartition("/")
        return ShardFolder(location), name
    return ShardFolder(str(Path(shard).parent)), Path(shard).name


def by_folder(shards: Sequence[str]) -> dict[ShardFolder, list[str]]:
    """Return the file names of shards by folder, both in order of first appearance."""
    groups: dict[ShardFolder, list[str]] = {}
    for shard in shards:
        folder, name = folder_of(shard)
        groups.setdefault(folder, []).append(name)
    return groups


def resolve_shards(spec: ShardSpec) -> list[str]:
    """Return the paths and URLs of the tar files that a spec names, each once.

    They are sorted within a folder or a glob.

    Raises:
        ValueError: a part of the spec, named in the error, matches nothing or cannot be read.
    """
    shards: list[str] = []
    for text in spec_parts(spec):
        try:
            shards += _resolve_remote(text) if remote.is_remote(text) else _resolve_local(text)
        except PermissionError as error:
            raise ValueError(
                f"{error.filename or text} cannot be read: {error.strerror}; make it readable"
            ) from error
    if _are_distinct_files(shards):
        return shards
    found: dict[object, str] = {}
    for shard in shards:
        found.setdefault(file_mark(shard), shard)
    return list(found.values())


def _are_distinct_files(shards: Sequence[str]) -> bool:
    """Return True if the lists of their folders alone show that no two shards are one file.

    Every rank of a run asks, and on a parallel file system a question for each of 100,000 files
    takes minutes. False: it takes such questions.
    """
    marks = set[tuple[int, int]]()
    names: dict[str, set[str]] = {}
    for shard in shards:
        if remote.is_remote(shard) or shard.lower().startswith("file:"):
            return False
        folder, name = os.path.split(shard)
        names.setdefault(folder or ".", set()).add(name)
    try:
        for folder, wanted in names.items():
            device = Path(folder).stat().st_dev
            with os.scandir(folder) as entries:
                files = [entry for entry in entries if entry.name in wanted]
            if any(entry.is_symlink() or entry.inode() == 0 for entry in files):
                return False
            marks.update((device, entry.inode()) for entry in files)
    except OSError:
        return False
    return len(marks) == len(shards)


def file_mark(shard: str) -> object:
    """Return a mark that is equal for all spellings of one file or URL, and for all links to it."""
    if shard.lower().startswith("file:"):
        shard = unquote(urlsplit(shard).path)
    if remote.is_remote(shard):
        url = urlsplit(shard)
        host = url.netloc.lower() if url.scheme.lower() in _DEFAULT_PORTS else url.netloc
        host = host.removesuffix(_DEFAULT_PORTS.get(url.scheme.lower(), "\0"))
        return url.scheme.lower(), host, unquote(url.path), url.query
    try:
        status = Path(shard).stat()
    except OSError:
        return os.path.realpath(shard)
    return status.st_dev, status.st_ino, status.st_size


def spec_parts(spec: ShardSpec) -> list[str]:
    """Return the parts of a spec as text, with ~ expanded; ValueError if it is not a spec."""
    if not isinstance(spec, str | Path | Sequence):
        raise ValueError(f"shards are {spec!r}; give a folder, tar file, glob, braces or a list")
    texts = []
    for part in [spec] if isinstance(spec, str | Path) else spec:
        if not isinstance(part, str | Path):
            raise ValueError(
                f"the list of shards has {part!r}; each must be a path, glob or brace expansion"
            )
        text = str(part)
        if not text.strip():
            raise ValueError("a path of the shards is empty; give a folder or tar file")
        texts.append(text if remote.is_remote(text) else str(Path(text).expanduser()))
    if not texts:
        raise ValueError("the list of shards is empty; give at least one folder or tar file")
    return texts


def remote_pattern(text: str) -> str:
    """Return the glob that a remote spec part without braces stands for."""
    return text if text.endswith(".tar") else f"{text.rstrip('/')}/*.tar"


def _resolve_remote(text: str) -> list[str]:
    shards = []
    for url in map(remote_pattern, braceexpand.braceexpand(text)):
        matches = remote.expand_glob(url) if "*" in url or "[" in url else [url]
        if not matches:
            raise ValueError(f"no shard matches {url}")
        shards += matches
    return shards


def _resolve_local(text: str) -> list[str]:
    if Path(text).is_dir():
        # Not a glob, which returns nothing for an unreadable folder.
        with os.scandir(text) as entries:
            found = [entry for entry in entries if Path(entry.name).suffix == ".tar"]
        shards = [entry for entry in found if not entry.name.startswith(".")]
        if not shards and Path(text, "train").is_dir():
            raise ValueError(
                f"{text} holds no .tar shards itself; give {text}/train, or another folder in it"
            )
        if not shards:
            raise ValueError(
                f"{text} holds no .tar shards{_named_otherwise(Path(text))}; write some with `zeta "
                "shards build IMAGES OUT`"
            )
        return sorted(str(_regular(entry)) for entry in shards)
    paths: list[Path] = []
    for pattern in [text] if Path(text).is_file() else braceexpand.braceexpand(text):
        path = Path(pattern)
        relative = pattern.removeprefix(path.anchor)
        matches = [path] if path.is_file() else sorted(Path(path.anchor).glob(relative))
        if not matches:
            if path.parent.is_dir():
                any(path.parent.iterdir())  # raises if the folder is unreadable
            raise ValueError(f"no shard matches {pattern}")
        paths += matches
    for path in paths:
        if path.suffix != ".tar" or not path.is_file():
            remedy = _remedy(path.name) if path.is_file() else None
            raise ValueError(f"{path} is not a .tar file{f': {remedy}' if remedy else ''}")
    return [str(path) for path in paths]


def _regular(entry: os.DirEntry[str]) -> Path:
    """Return the path of a shard; ValueError unless it is a file, as a pipe would never end."""
    path = Path(entry.path)
    if not entry.is_file():  # known from the list of the folder
        raise ValueError(
            f"{path} is no file (but a folder, a broken link or a pipe): move it away, or give the "
            "shards by their names"
        )
    return path


def _named_otherwise(folder: Path) -> str:
    """Return what to do with shards whose names do not end in .tar, for a message; else ""."""
    others = nearly_shards(folder)
    if not others:
        return ""
    return f", but {len(others):,} such as {others[0]}: {_remedy(others[0])}"


def nearly_shards(folder: Path) -> list[str]:
    """Return the names of the files in a folder that are shards but for their names, sorted."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [name for name in names if _remedy(name) and not name.startswith(".")]


def _remedy(name: str) -> str | None:
    """Return what makes a shard of a file that is compressed or named .TAR; None for others."""
    lower = name.lower()
    if lower.endswith(_COMPRESSED):
        return "samples are read at any place, so unpack it to a plain .tar"
    return "rename it to end in .tar" if lower.endswith(".tar") and name[-4:] != ".tar" else None
