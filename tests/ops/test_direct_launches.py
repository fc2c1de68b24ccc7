"""Launches past Triton's own dispatch: only of pointers that a kernel was compiled for."""

from types import SimpleNamespace

import pytest
import torch

direct = pytest.importorskip("deltadecode.ops.triton.direct")
Pointer = pytest.importorskip("deltadecode.ops").Pointer


class Kernel:
    """Takes the place of a compiled function, and writes down how it is launched."""

    arg_names = ("x_ptr", "y_ptr", "n", "SIZE", "FLAG")

    def __init__(self):
        self.ordinary, self.direct = [], []

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.ordinary.append((grid, args, constants))
            return self.compiled()

        return launch

    def warmup(self, *args, grid, **constants):
        self.warmed = grid, args, constants
        return self.compiled()

    def compiled(self):
        return SimpleNamespace(
            run=lambda *args: self.direct.append(args), function="code", packed_metadata="meta"
        )


@pytest.fixture
def kernel(monkeypatch):
    active = SimpleNamespace(
        get_current_device=lambda: 3, get_current_stream=lambda device: f"stream of {device}"
    )
    monkeypatch.setattr(direct, "driver", SimpleNamespace(active=active))
    return Kernel()


def launch_of(kernel):
    constants = {"FLAG": True, "num_warps": 8, "SIZE": 64}
    return direct.Launch(kernel, (2, 3, 1), (7,), constants)


X, Y, ODD = (Pointer(address, torch.float32) for address in (160, 48, 24))
DIRECT = (2, 3, 1, "stream of 3", "code", "meta", None, None, None)


def test_after_the_first_launch_the_compiled_kernel_is_launched_directly(kernel):
    launch = launch_of(kernel)
    launch(X, Y)
    assert kernel.ordinary == [((2, 3, 1), (X, Y, 7), {"FLAG": True, "num_warps": 8, "SIZE": 64})]
    launch(Y, X)
    assert len(kernel.ordinary) == 1
    # Compile-time parameters in the order of the kernel, options not at all.
    assert kernel.direct == [(*DIRECT, 48, 160, 7, 64, True)]


def test_a_pointer_of_another_alignment_is_left_to_triton(kernel):
    launch = launch_of(kernel)
    launch(X, ODD)
    launch(X, ODD)
    launch(X, Y)
    assert len(kernel.ordinary) == 3 and not kernel.direct
    launch(ODD, Y)
    assert len(kernel.ordinary) == 4 and not kernel.direct
    launch(X, Y)
    assert len(kernel.ordinary) == 4 and len(kernel.direct) == 1


def test_a_profiler_hears_of_every_launch(kernel, monkeypatch):
    launch = launch_of(kernel)
    launch(X, Y)
    # Newer versions have a chain of hooks, older ones one hook.
    for hook in (SimpleNamespace(calls=[print]), print):
        monkeypatch.setattr(direct.knobs.runtime, "launch_enter_hook", hook)
        launch(X, Y)
    assert len(kernel.ordinary) == 3
    for hook in (SimpleNamespace(calls=[]), None):
        monkeypatch.setattr(direct.knobs.runtime, "launch_enter_hook", hook)
        launch(X, Y)
    assert len(kernel.ordinary) == 3 and len(kernel.direct) == 2


def test_what_is_compiled_ahead_is_launched_directly(kernel):
    launch = launch_of(kernel)
    launch.compile(torch.float32, torch.int32)
    grid, (x, y, number), _ = kernel.warmed
    assert (grid, x.dtype, y.dtype, number) == ((2, 3, 1), torch.float32, torch.int32, 7)
    assert x.data_ptr() % 16 == y.data_ptr() % 16 == 0
    launch(X, Y)
    assert not kernel.ordinary and len(kernel.direct) == 1
