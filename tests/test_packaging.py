"""pyproject.toml, requirements.lock, environment.yml and CITATION.cff say the same."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
CONDA_NAMES = {"matplotlib-base": "matplotlib"}  # conda's name: the package index's name
PLATFORMS = {
    "Linux x86-64": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    "Linux arm64": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64"},
    "macOS arm64": {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(extras: bool = True) -> list[Requirement]:
    """What pyproject.toml asks for."""
    lines = list(project()["dependencies"])
    if extras:
        for more in project()["optional-dependencies"].values():
            lines += more
    return [Requirement(line) for line in lines]


def locked() -> list[tuple[Requirement, list[str]]]:
    """Each requirement of the lock file with its hashes."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    entries = []
    for line in text.splitlines():
        if line and not line.startswith("#"):
            specification, *hashes = line.split("--hash=")
            entries.append((Requirement(specification.strip()), [part.strip() for part in hashes]))
    return entries


def locked_version(name: str) -> str:
    versions = {
        next(iter(entry.specifier)).version
        for entry, _ in locked()
        if canonicalize_name(entry.name) == canonicalize_name(name)
    }
    assert len(versions) == 1, f"{name} is locked as {versions or 'nothing'}"
    return versions.pop()


def environment() -> tuple[list[str], list[str]]:
    """The specs of environment.yml: conda's and pip's."""
    specs = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = [spec["pip"] for spec in specs if isinstance(spec, dict)]
    assert len(pip) == 1, "one pip section"
    return [spec for spec in specs if isinstance(spec, str)], pip[0]


def pip_requirements() -> list[Requirement]:
    return [Requirement(line) for line in environment()[1] if not line.startswith("-")]


# --- the lock file ------------------------------------------------------------------------


def test_every_locked_package_has_one_version_and_a_hash():
    entries = locked()
    assert len(entries) > 50
    for entry, hashes in entries:
        assert [s.operator for s in entry.specifier] == ["=="], entry
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", h) for h in hashes), entry.name


def test_the_lock_names_no_index():
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"://|--(extra-)?index-url|--find-links|-e ", text)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_has_what_pyproject_asks_for(platform, python):
    where = PLATFORMS[platform] | {"python_version": python, "python_full_version": f"{python}.9"}
    have = {
        canonicalize_name(entry.name): next(iter(entry.specifier)).version
        for entry, _ in locked()
        if entry.marker is None or entry.marker.evaluate(where)
    }
    for wanted in requirements():
        if wanted.marker is None or wanted.marker.evaluate(where):
            version = have.get(canonicalize_name(wanted.name))
            assert version and wanted.specifier.contains(version), f"{wanted}: locked is {version}"
    assert ("mlx-cpu" in have) == platform.startswith("Linux")
    assert ("mlx-metal" in have) == platform.startswith("macOS")


# --- environment.yml ----------------------------------------------------------------------


def test_conda_can_read_the_specs():
    rattler = pytest.importorskip("rattler", reason="py-rattler, conda's parser, is not installed")
    with pytest.raises(Exception, match="unable to parse"):
        rattler.MatchSpec("numpy ==>1", strict=True)  # so that accepting means something
    for spec in environment()[0]:
        assert rattler.MatchSpec(spec, strict=True).name is not None, spec


def test_conda_versions_are_the_locked_ones():
    for spec in environment()[0]:
        name, _, version = spec.partition("=")
        name = CONDA_NAMES.get(name, name)
        if name == "python":
            assert Requirement(f"python{project()['requires-python']}").specifier.contains(f"{version}.0")
        elif name != "pip":
            assert version == locked_version(name), spec


def test_pip_versions_are_the_locked_ones():
    for requirement in pip_requirements():
        assert str(requirement.specifier) == f"=={locked_version(requirement.name)}", requirement


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_environment_has_what_pyproject_asks_for(platform):
    where = PLATFORMS[platform]
    conda = {CONDA_NAMES.get(name, name) for name in (spec.partition("=")[0] for spec in environment()[0])}
    pip = {r.name: r.extras for r in pip_requirements() if r.marker is None or r.marker.evaluate(where)}
    for wanted in requirements(extras=False):
        if wanted.marker is None or wanted.marker.evaluate(where):
            assert wanted.name in conda or wanted.extras <= pip[wanted.name], wanted


def test_the_environment_installs_this_package():
    assert "-e ." in environment()[1]


# --- names and numbers of the package -----------------------------------------------------


def test_version_and_name_are_the_same_everywhere():
    import m2r2kit

    assert project()["name"] == "m2r2kit"
    assert Version(project()["version"]) == Version(m2r2kit.__version__)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == project()["version"]


def test_the_console_command_is_there():
    module, _, function = project()["scripts"]["m2r2kit"].partition(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))


def test_the_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "preferred-citation"} <= citation.keys()
    paper = citation["preferred-citation"]
    assert paper["title"] == "M2R2: Mixture of Multi-rate Residuals for Efficient Transformer Inference"
    assert [author["family-names"] for author in paper["authors"]] == [
        "Bhendawade", "Najibi", "Naik", "Belousova",
    ]  # fmt: skip
    assert paper["year"] == 2025
    assert "arXiv:2502.02040" in [identifier["value"] for identifier in paper["identifiers"]]
