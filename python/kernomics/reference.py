"""The definitions: ``kernomics.reference.<op>(...)`` checks the call and runs the op's NumPy body in float64."""

from kernomics.contract import OPS
from kernomics.numpy_ops import checked


def _make(op):
    def call(*args, **kwargs):
        import inspect

        bound = inspect.signature(op.define).bind(*args, **kwargs)
        bound.apply_defaults()
        tensors = [bound.arguments[n] for n in op.tensors]
        _, _, scalars = checked(op, tensors, [bound.arguments[s.name] for s in op.scalars])
        return op.define(**dict(zip(op.tensors, tensors)), **dict(zip((s.name for s in op.scalars), scalars)))

    call.__name__, call.__doc__ = op.name, op.__doc__
    return call


def __getattr__(name):
    if name in OPS:
        globals()[name] = made = _make(OPS[name])
        return made
    raise AttributeError(f"kernomics.reference has no op {name!r}")


def __dir__():
    return sorted(OPS)
