"""A tiny registry in place of the real one, and a process that dies on cue.

Run as: python fake_assets.py ARCHIVES STAGE   (fetches the fake `letters` asset; kills itself with SIGKILL at STAGE)
"""

import hashlib
import io
import os
import shutil
import signal
import sys
import tarfile
import time
import zipfile
from pathlib import Path

from selfaug.assets import fetch, pip_download, registry

TEXT = b"a\nb\nc\n"
EVIL_BACKEND = b"raise SystemExit('the backend of the sdist was run')\n"


def letters(member: Path, out: Path) -> int:
    """The fake build: copies the member and counts its lines."""
    (out / "letters.txt").write_bytes(member.read_bytes())
    return len(member.read_bytes().splitlines())


def folder_of_letters(member: Path, out: Path) -> int:
    """The fake build of a folder: copies it and counts its files."""
    shutil.copytree(member, out / "letters")
    return sum(path.is_file() for path in member.rglob("*"))


def write_archives(folder: Path) -> None:
    """A wheel and an sdist of the package `selfaug-letters`, as an index would hold them."""
    folder.mkdir(parents=True, exist_ok=True)
    info = "selfaug_letters-1.0.dist-info"
    with zipfile.ZipFile(folder / "selfaug_letters-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("letters/letters.txt", TEXT)
        wheel.writestr("letters/more/", "")
        wheel.writestr("letters/more/d.txt", b"d\n")
        wheel.writestr("letters/more/deep/e.txt", b"e\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: selfaug-letters\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    project = '[build-system]\nrequires = ["no-such-backend"]\nbuild-backend = "evil.build"\n'
    files = {
        "pyproject.toml": project.encode(),
        "data.txt": TEXT,
        "evil/__init__.py": b"",
        "evil/build.py": EVIL_BACKEND,
    }
    with tarfile.open(folder / "selfaug_letters-1.0.tar.gz", "w:gz") as sdist:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"selfaug_letters-1.0/{name}")
            entry.size = len(content)
            sdist.addfile(entry, io.BytesIO(content))
        link = tarfile.TarInfo("selfaug_letters-1.0/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "data.txt"
        sdist.addfile(link)


def asset(archives: Path, name: str = "letters", sdist: bool = False, **changes) -> registry.Asset:
    """An asset of the fake wheel (or sdist), with any field changed."""
    filename = "selfaug_letters-1.0.tar.gz" if sdist else "selfaug_letters-1.0-py3-none-any.whl"
    content = (archives / filename).read_bytes()
    archive = registry.Archive(
        package="selfaug-letters",
        version="1.0",
        filename=filename,
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        backend="evil.build" if sdist else "",
    )
    fields = {
        "name": name,
        "archive": archive,
        "member": "selfaug_letters-1.0/data.txt" if sdist else "letters/letters.txt",
        "build": letters,
        "count": 3,
        "unit": "letters",
        "about": "three letters",
        "licence": "CC0-1.0",
        "source": "the alphabet",
        "work_bytes": 1000,
    }
    return registry.Asset(**(fields | changes))


def copy_from(archives: Path):
    """Stands in for pip: copies the archive from a folder, and writes down that it was asked."""

    def download(archive: registry.Archive, work: Path) -> Path:
        with (archives / "downloads.log").open("a") as log:
            log.write(archive.filename + "\n")
        (work / archive.filename).write_bytes((archives / archive.filename).read_bytes())
        return work / archive.filename

    return download


def downloads(archives: Path) -> int:
    """How often the stand-in was asked."""
    log = archives / "downloads.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def die(*_args, **_kwargs) -> None:
    """What `kill -9` does: no handler, no clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


def _run(archives: Path, stage: str) -> None:
    def half_build(member: Path, out: Path) -> int:
        (out / "letters.txt").write_bytes(TEXT[:2])
        die()
        return 3

    def half_copy(source, target, *_):
        if target is not None:
            target.write(TEXT[:2])
            target.flush()
            die()
        return genuine_copy(source, target, *_)

    def slow_build(member: Path, out: Path) -> int:
        time.sleep(0.5)  # long enough for the other process to come to the lock
        return letters(member, out)

    genuine_copy, genuine_manifest = fetch._copy, fetch._write_manifest
    download = copy_from(archives)
    build = {"build": half_build, "slow": slow_build}.get(stage, letters)
    if stage == "download":
        pip_download.download = lambda archive, work: (download(archive, work).write_bytes(b"half"), die())
    else:
        pip_download.download = download
    if stage == "extract":
        fetch._copy = half_copy
    if stage == "manifest":
        fetch._write_manifest = lambda *args: (genuine_manifest(*args), die())
    if stage == "dispose":
        fetch._dispose = die
    print(fetch.fetch([asset(archives, build=build)])[0])


if __name__ == "__main__":
    _run(Path(sys.argv[1]), sys.argv[2])
