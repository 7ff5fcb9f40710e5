"""The attention/MoE core of DeepSeek-class models: ops on PyTorch tensors or NumPy arrays, and what they cost.

``kernomics.<op>(...)`` takes torch tensors or NumPy arrays (ml_dtypes for bf16 and FP8) and returns the same
kind; ``kernomics.reference.<op>(...)`` is the NumPy definition in float64; ``torch.ops.kernomics.<op>`` exists
as soon as both packages are imported, in either order.
"""

import importlib.abc
import importlib.util
import sys

from kernomics import numerics, numpy_ops, ops, reference
from kernomics.contract import OPS, ContractError, NoKernel
from kernomics.numpy_ops import get_num_threads, set_num_threads

__version__ = "0.0.1"
__all__ = ["OPS", "ContractError", "NoKernel", "get_num_threads", "numerics", "ops", "reference", "set_num_threads", *OPS]

numpy_ops.register()
globals().update({name: op.public for name, op in OPS.items()})


class _AfterTorch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Registers the torch ops once torch has been imported; takes itself out of ``sys.meta_path`` then."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None:
            sys.meta_path.insert(0, self)
            return None
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module("kernomics.torch_ops")


if sys.modules.get("torch") is not None:
    importlib.import_module("kernomics.torch_ops")
else:
    sys.meta_path.insert(0, _AfterTorch())
