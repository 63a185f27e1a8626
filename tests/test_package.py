"""The wheel works without the checkout: the configuration is inside."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = (".py", ".yaml", ".html", ".css", ".js")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (path,) = out.glob("selfaug-*.whl")
    return path


def test_wheel_holds_the_whole_package_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if not name.partition("/")[0].endswith(".dist-info")}
    wanted = {str(p.relative_to(ROOT)) for p in (ROOT / "selfaug").rglob("*") if p.suffix in SHIPPED}
    wanted |= {"hydra_plugins/selfaug_optuna.py"}
    assert inside == wanted
    assert sum(name.endswith(".yaml") for name in inside) >= 30


def test_unpacked_wheel_shows_its_configuration(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()

    def python(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path / "elsewhere", env=environment, check=True, capture_output=True,
            text=True, timeout=120,
        ).stdout  # fmt: skip

    assert python("-c", "import selfaug; print(selfaug.__file__)").startswith(str(tmp_path / "site"))
    config = yaml.safe_load(python("-m", "selfaug.train", "--cfg", "job", "alignment.alpha=0.3"))
    assert config["alignment"]["alpha"] == 0.3
    assert config["data"]["name"] == "squad"
    assert list((tmp_path / "elsewhere").iterdir()) == []
