"""Imports point one way, and importing kernomics brings in neither torch nor triton; torch ops exist in either order."""

import ast
import pathlib
import subprocess
import sys

import pytest

import kernomics

PACKAGE = pathlib.Path(kernomics.__file__).parent
ORDER = ["chip", "contract", "numerics", "ops", "numpy_ops", "reference", "torch_ops"]


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            if node.module == "kernomics":
                yield from (f"kernomics.{a.name}" for a in node.names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    used = {m.split(".")[1] for m in imports(path) if m.startswith("kernomics.")}
    libraries = {m.split(".")[0] for m in imports(path)}
    if room in ORDER:
        later = set(ORDER[ORDER.index(room) + 1:]) | {"cost", "bench", "cli"}
        assert not used & later, f"{room} reaches forward to {used & later}"
    if room == "contract":
        assert not libraries - set(sys.stdlib_module_names) - {"kernomics"}
    if room in ("numerics", "ops", "numpy_ops", "cost", "reference"):
        assert not libraries & {"torch", "triton"}


def test_import_brings_no_torch():
    out = run("import sys, kernomics, numpy as np; kernomics.fp8_quantize(np.ones((1, 4), np.float32));"
              "print([m for m in ('torch', 'triton', 'matplotlib', 'typer') if m in sys.modules])")
    assert out == "[]"


@pytest.mark.parametrize("first, second", [("torch", "kernomics"), ("kernomics", "torch")])
def test_import_order(first, second):
    out = run(f"import {first}, {second}, torch;"
              "import sys; print(torch.ops.kernomics.fp8_quantize(torch.ones(1, 4))[1].shape, "
              "[f for f in sys.meta_path if type(f).__name__ == '_AfterTorch'], torch.__spec__.name)")
    assert out == "torch.Size([1, 1]) [] torch"


def test_failed_torch_import_leaves_numpy_users_alone():
    out = run("import sys; sys.modules['torch'] = None\nimport kernomics, numpy as np\n"
              "print(kernomics.fp8_quantize(np.ones((1, 4), np.float32))[1].shape)")
    assert out == "(1, 1)"


def test_forced_isa():
    code = "import kernomics._cpu as c; print(c.isa())"
    for isa in kernomics._cpu.isas():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"KERNOMICS_ISA": isa})
        assert done.stdout.strip() == isa, done.stderr
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"KERNOMICS_ISA": "mmx"})
    assert "KERNOMICS_ISA=mmx: this machine does not run it" in done.stderr


def test_docstring_examples():
    import doctest

    for op in kernomics.OPS.values():
        finder = doctest.DocTestFinder()
        for example in finder.find(op.define, op.name, globs={"kernomics": kernomics, op.name: op.public}):
            result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example)
            assert result.failed == 0, op.name
            assert result.attempted > 0, f"{op.name} has no example"
