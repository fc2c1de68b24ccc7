"""The three wheels: what each holds, and that they work where nothing of the checkout is."""

import json
import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"demo": "embedded", "clsa": "clsa"}  # extra -> folder in packages


def build(folder, into):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(into)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Library's wheel, and by folder those of both models."""
    dist = tmp_path_factory.mktemp("dist")
    build(ROOT, dist)
    (library,) = dist.glob("deltadecode-*.whl")
    models = {}
    for name in MODELS.values():
        build(ROOT / "packages" / name, dist)
        (models[name],) = dist.glob(f"deltadecode_{name}-*.whl")
    return library, models


def files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode("utf-8"))


def test_the_library_is_below_1_mb_and_holds_profiles_types_and_licence(wheels):
    library, _ = wheels
    assert library.stat().st_size < 1_000_000
    source = ROOT / "src" / "deltadecode"
    data = [*source.glob("profiles/*.json"), *source.glob("lab/inspection/assets/*")]
    assert len(data) >= 7
    named = {path.relative_to(ROOT / "src").as_posix() for path in [*data, source / "py.typed"]}
    assert named <= files(library)
    assert any(name.endswith("licenses/LICENSE") for name in files(library))


def test_the_library_holds_no_weights_and_nothing_that_measures_it(wheels):
    library, _ = wheels
    tops = {name.split("/")[0] for name in files(library) if ".dist-info/" not in name}
    assert tops == {path.parent.name for path in ROOT.glob("src/*/__init__.py")}
    assert not [name for name in files(library) if re.search(r"safetensors$|/model/", name)]


@pytest.mark.parametrize("name", MODELS.values())
def test_a_models_wheel_holds_it_and_its_licence(wheels, name):
    wheel = wheels[1][name]
    model = ROOT / "packages" / name / "src" / f"deltadecode_{name}" / "model"
    named = {f"deltadecode_{name}/model/{path.name}" for path in model.iterdir()}
    assert f"deltadecode_{name}/model/model.safetensors" in named
    assert named <= files(wheel)
    assert any(path.endswith("licenses/LICENSE") for path in files(wheel))


@pytest.mark.parametrize(("extra", "name"), MODELS.items())
def test_an_extra_asks_for_this_model(wheels, extra, name):
    library, model = metadata(wheels[0]), metadata(wheels[1][name])
    assert library["Version"] == model["Version"]
    needed = f"deltadecode-{name}=={model['Version']}; extra == '{extra}'"
    assert needed in library.get_all("Requires-Dist")


@pytest.fixture(scope="module")
def installed(wheels, tmp_path_factory):
    """Run a command of an environment that has the library's wheel, and then also the model's.

    All other packages are those of this environment, added by their folder: so the folder's own
    links to the checkout play no part.
    """
    home = tmp_path_factory.mktemp("elsewhere")
    venv = home / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }

    def run(program, *arguments):
        command = [str(venv / "bin" / program), *arguments]
        done = subprocess.run(
            command, cwd=home, env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout, done.stderr

    def install(wheel):
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        options = ["install", "--quiet", "--no-index", "--no-deps", "--force-reinstall"]
        subprocess.run(
            [*pip, "--python", str(venv / "bin" / "python"), *options, str(wheel)],
            env=environment,
            check=True,
            capture_output=True,
        )

    library, models = wheels
    install(library)
    ours = {Path(path) for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    (site / "others.pth").write_text("".join(f"{path}\n" for path in sorted(ours)))
    before = run("deltadecode", "demo", "--steps", "1")
    install(models["embedded"])
    return run, site, before


def test_the_modules_come_from_the_wheels(installed):
    run, site, _ = installed
    for name in ("deltadecode", "deltadecode_embedded"):
        done = run("python", "-c", f"import {name}; print({name}.__file__)")
        assert done == (0, f"{site / name}/__init__.py\n", "")


def test_the_library_alone_says_in_one_line_how_to_get_the_model(installed):
    _, _, (code, out, err) = installed
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("deltadecode: error: ") and "deltadecode[demo]" in last
    assert "Traceback" not in err


def test_the_demo_runs_from_the_wheels(installed):
    run, _, _ = installed
    code, out, err = run("deltadecode", "demo", "--seed", "0", "--steps", "1", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["correct"] and result["same_answer"]
    assert result["answer"] == result["expected"]
