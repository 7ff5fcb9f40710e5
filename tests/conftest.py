"""Shared by the tests of laws: the backends they run on."""

import pytest


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Runs a law on the definition and on the CPU kernels of the module's ``USED`` (skipped while one is not built)."""
    if request.param == "cpu":
        module = pytest.importorskip("kernomics._cpu", exc_type=ImportError)
        for op in request.module.USED:
            if not hasattr(module, op):
                pytest.skip(f"kernomics._cpu has no {op} yet")
    return request.param
