"""The house: imports go down only, and the method's part of awq.py can be pasted."""
import ast
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import awq

FLOORS = {"kernel": 0, "blocks": 0, "rounding": 0, "checkpoint": 1, "awq": 2, "eval": 3,
          "studies": 4}
FILES = sorted(ROOT.glob("*.py"))


def imported(tree):
    """The first part of every module name that is imported, anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                ("__import__", "import_module")):
            yield node.args[0].value.partition(".")[0]      # a literal: else it cannot be read


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_go_down_only(path):
    """Strictly down, hence in no circle; nor is a module reached through sys.modules ."""
    tree = ast.parse(path.read_text())
    ours = FLOORS.keys() & set(imported(tree))
    assert all(FLOORS[name] < FLOORS[path.stem] for name in ours), (path.stem, ours)
    assert "sys.modules" not in ast.unparse(tree)


PASTE = """
import builtins, sys, torch
real = builtins.__import__

def only_torch(name, namespace=None, *rest):
    caller = (namespace or {}).get("__name__")
    if caller == "pasted" and name.partition(".")[0] not in {"torch", *sys.stdlib_module_names}:
        raise ImportError(f"{name} is not torch")
    return real(name, namespace, *rest)

builtins.__import__ = only_torch
space = {"__name__": "pasted"}
exec(sys.stdin.read(), space)
torch.save(space["quantize"](torch.load(sys.argv[1]), 3, 16), sys.argv[1])
"""


def test_the_method_needs_torch_alone(tmp_path):
    """Exactly the lines above the mark, in an empty namespace of a process of its own."""
    method, mark, _ = (ROOT / "awq.py").read_text().partition("# ==== Here the method ends")
    assert mark and method.count("\n") < 330
    W = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    torch.save(W, tmp_path / "W")
    subprocess.run([sys.executable, "-c", PASTE, tmp_path / "W"], input=method, text=True,
                   check=True, cwd=tmp_path)
    for pasted, ours in zip(torch.load(tmp_path / "W"), awq.quantize(W, 3, 16), strict=True):
        assert torch.equal(pasted, ours)
