"""Imports run downward and never in a circle, those inside functions and for types included."""

from pathlib import Path

import grimp
import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings its twin along
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
PACKAGES = SETTINGS["importlinter"]["root_packages"]


def circles(arrows):
    """Tarjan's strongly connected components of more than one node, each sorted."""
    number, lowest, stack, found = {}, {}, [], []

    def visit(node):
        number[node] = lowest[node] = len(number)
        stack.append(node)
        for target in sorted(arrows.get(node, ())):
            if target not in number:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in stack:
                lowest[node] = min(lowest[node], number[target])
        if lowest[node] == number[node]:
            circle = stack[stack.index(node) :]
            del stack[len(stack) - len(circle) :]
            if len(circle) > 1:
                found.append(sorted(circle))

    for node in sorted(arrows):
        if node not in number:
            visit(node)
    return found


def file_arrows(graph):
    """File -> files it imports; a package stands for its ``__init__.py``."""
    return {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}


def room_arrows(arrows, package):
    """Room of a package -> rooms beside it that its files import; the package itself is none."""
    depth = package.count(".") + 2

    def room(name):
        return ".".join(name.split(".")[:depth]) if name.startswith(f"{package}.") else None

    rooms = {room(name): set() for name in arrows} | {None: set()}
    for name, targets in arrows.items():
        rooms[room(name)] |= {room(target) for target in targets} - {room(name), None}
    del rooms[None]
    return rooms


@pytest.fixture(scope="module")
def arrows():
    return file_arrows(grimp.build_graph(*PACKAGES, cache_dir=None))


def test_files_import_each_other_in_no_circle(arrows):
    assert circles(arrows) == []


def test_rooms_import_each_other_in_no_circle(arrows):
    packages = {name.rpartition(".")[0] for name in arrows} - {""}
    found = {package: circles(room_arrows(arrows, package)) for package in sorted(packages)}
    assert {package: rooms for package, rooms in found.items() if rooms} == {}


def test_every_package_of_the_repository_is_in_the_contracts():
    sources = {path.parent.name for path in ROOT.glob("src/*/__init__.py")}
    assert sources | {"benchmarks"} == set(PACKAGES)


def test_rooms_beside_each_other_stand_beside_each_other_in_the_contracts():
    # ":" would let them import each other.
    layers = [
        layer
        for contract in SETTINGS["importlinter"]["contracts"]
        for layer in contract.get("layers", [])
    ]
    assert layers and not any(":" in layer for layer in layers)


def test_a_circle_is_seen_wherever_the_import_stands(tmp_path, monkeypatch):
    files = {
        "__init__": "",
        "above/__init__": "",
        "above/first": "from circled.below.second import two\none = 1\n",
        "below/__init__": "",
        "below/second": "def two():\n    from circled.above import first\n    return first.one\n",
        "below/third": "import typing\nif typing.TYPE_CHECKING:\n    from . import fourth\n",
        "below/fourth": "from circled.below import third\n",
    }
    for name, text in files.items():
        path = tmp_path / "circled" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    drawn = file_arrows(grimp.build_graph("circled", cache_dir=None))
    assert circles(drawn) == [
        ["circled.above.first", "circled.below.second"],
        ["circled.below.fourth", "circled.below.third"],
    ]
    assert circles(room_arrows(drawn, "circled")) == [["circled.above", "circled.below"]]
