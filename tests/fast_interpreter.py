"""Triton's interpreter with the same results in less time: kernels' tests spend theirs in it.

It looks up a table of types at every operation, lists the members of ``triton.language`` at every
call of a function, and reduces with a function of the kernel's own element by element.
"""

import functools
import inspect

import numpy as np


def install():
    """Patch the interpreter of this process; without Triton there is none."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ModuleNotFoundError:
        return

    scalar_type = functools.cache(interpreter._get_np_dtype)
    address = np.dtype(np.uint64)
    names = {}

    def numpy_type(of):
        of = of.element_ty if isinstance(of, tl.block_type) else of
        return address if isinstance(of, tl.pointer_type) else scalar_type(of)

    def patch_builtin(package, builder, scope):
        if package not in names:
            members = inspect.getmembers(package)
            names[package] = [name for name, member in members if tl.core.is_builtin(member)]
        for name in names[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    by_element = interpreter.ReduceOps.generic_reduce

    def by_slice(self, inputs):
        if self.axis is None:
            return by_element(self, inputs)
        slices = [np.moveaxis(each.handle.data, self.axis, 0) for each in inputs]
        kinds = [each.dtype for each in inputs]

        def at(place):
            return [
                self.to_tensor(part[place], kind) for part, kind in zip(slices, kinds, strict=True)
            ]

        result = tuple(at(0))
        for place in range(1, len(slices[0])):
            result = self.combine_fn.fn(*result, *at(place))
            result = result if isinstance(result, tuple) else (result,)
        arrays = [
            part.handle.data.reshape(values.shape[1:])
            for part, values in zip(result, slices, strict=True)
        ]
        if self.keep_dims:
            arrays = [np.expand_dims(array, self.axis) for array in arrays]
        return [self.to_tensor(array, kind) for array, kind in zip(arrays, kinds, strict=True)]

    interpreter._get_np_dtype = numpy_type
    interpreter._patch_builtin = patch_builtin
    interpreter.ReduceOps.generic_reduce = by_slice
