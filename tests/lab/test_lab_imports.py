"""The laboratory imports what the extra ``lab`` brings only where it draws or tests."""

import pkgutil
import subprocess
import sys

import deltadecode.lab

_BLOCKED = """
import importlib, sys
for name in ("matplotlib", "plotly", "scipy"):
    sys.modules[name] = None  # an import of it raises
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_only_figures_need_what_the_extra_brings():
    found = pkgutil.walk_packages(deltadecode.lab.__path__, "deltadecode.lab.")
    names = [module.name for module in found if not module.name.endswith(".figures")]
    assert len(names) > 40 and "deltadecode.lab.evaluation.report" in names
    done = subprocess.run(
        [sys.executable, "-c", _BLOCKED, *names], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
