"""What is installed: the packages and modules of pyproject.toml, and the versions that
requirements.lock repeats. And the quick tests are tests."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.helpers.quick import QUICK
from tools.shared_blocks import ROOT, TOP_LEVEL

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
LOCK = (ROOT / "requirements.lock").read_text()
PINS = dict(re.findall(r"^([\w.-]+)==(\S+) \\$", LOCK, re.M))
NOT_INSTALLED = {"tests", "tools"}  # of use in the repository alone


def test_every_module_is_installed():
    """Scripts, commands, and every package, with the files beside the code of common/."""
    assert sorted(SETTINGS["py-modules"]) == sorted(path.stem for path in ROOT.glob("*.py"))
    assert {path.stem for path in TOP_LEVEL} <= {*SETTINGS["py-modules"]}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    patterns = {name.removesuffix("*") for name in SETTINGS["packages"]["find"]["include"]}
    assert packages - NOT_INSTALLED <= patterns and not patterns & NOT_INSTALLED
    beside = {path.suffix for path in (ROOT / "common").rglob("*.*")}
    assert {f"*{suffix}" for suffix in beside - {".py", ".pyc"}} == {*SETTINGS["package-data"]["*"]}


@pytest.mark.parametrize("file", [f"requirements{end}.txt" for end in ("", "-dev", "-data")])
def test_the_lock_satisfies(file):
    """Every requirement, within its range."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line]
    assert requirements
    for requirement in requirements:
        version = PINS[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), f"{requirement}: {version} is locked"


def test_the_lock_is_complete():
    """Every package has one version and hashes; no index is named."""
    lines = [line for line in LOCK.splitlines() if line and not line.lstrip().startswith("#")]
    heads = [line for line in lines if not line.startswith(" ")]
    assert len(heads) == len(PINS) > 50 and "://" not in LOCK
    for package in re.split(r"^(?=[\w.-]+==)", LOCK, flags=re.M)[1:]:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", package), package


@pytest.mark.parametrize("entry", sorted(QUICK))
def test_quick_tests_exist(entry):
    file, _, name = entry.partition("::")
    text = (ROOT / file).read_text()
    assert name.partition("[")[0] in text
