"""Rules of the house that a machine can check: layers, names, size, what an import costs."""

import ast
import os
import re
import subprocess
import sys
import textwrap
import tokenize
import tomllib
from pathlib import Path

import pytest

import lowbit_kernels

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kernels" / "lowbit_kernels"
# a module may import from its own layer and from those to its right
LAYERS = (
    ("cli",),
    ("ssl_models",),
    ("checkpoint",),
    ("integrations",),
    ("conversion",),
    ("modules",),
    ("matmul", "conv1d", "attention", "norm", "fake_quant"),
    ("cpu",),
    ("checks", "device", "formats", "testing"),
)
MAX_LINES = 400
# of code lines; the library's is what users install to run a model
BUDGETS = {"lowbit_kernels": 17_250, "ssl_models": 5_000}


def layer_of(module):
    """Index of the layer that a dotted module name belongs to; None outside the project."""
    parts = module.split(".")
    if parts[0] == "lowbit_kernels":
        parts = parts[1:] or ["public"]
    elif parts[0] != "ssl_models":
        return None
    return next((i for i, names in enumerate(LAYERS) if parts[0] in names), None)


def sources():
    return [*PACKAGE.rglob("*.py"), *(ROOT / "ssl_models").rglob("*.py")]


def dotted(path):
    base = PACKAGE.parent if PACKAGE in path.parents else ROOT
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", sources(), ids=dotted)
def test_imports_run_one_way(path):
    own = layer_of(dotted(path))
    if own is None:
        pytest.skip("the public face imports from everywhere")
    for module in imports_of(path):
        target = layer_of(module)
        assert target is None or target >= own, f"{dotted(path)} imports {module}"
        stem = path.stem
        if stem == "reference" or stem.endswith("kernel"):
            assert not module.endswith(".op"), f"{dotted(path)} imports {module}"


def test_every_package_has_a_layer():
    known = {name for names in LAYERS for name in names}
    found = {
        p.stem for p in PACKAGE.iterdir() if not p.name.startswith("__") and p.suffix in ("", ".py")
    }
    assert found <= known


def test_kernels_is_a_source_root_and_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_files_stay_short():
    tracked = [*sources(), *(ROOT / "bench").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    lines = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in tracked}
    too_long = {str(p): n for p, n in lines.items() if n > MAX_LINES}
    assert not too_long
    spent = {
        name: sum(code_lines(path) for path in sources() if name in path.parts) for name in BUDGETS
    }
    assert all(0 < spent[name] <= BUDGETS[name] for name in BUDGETS), spent


def code_lines(path):
    """Lines that hold code: no blanks, comments or docstrings."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines, previous = set(), tokenize.NEWLINE
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            is_docstring = token.type == tokenize.STRING and previous in skipped
            if token.type not in skipped and not is_docstring:
                lines.update(range(token.start[0], token.end[0] + 1))
            previous = token.type
    return len(lines)


def test_public_names_are_frozen():
    assert lowbit_kernels.__all__ == sorted(lowbit_kernels.__all__)
    for name in lowbit_kernels.__all__:
        assert getattr(lowbit_kernels, name).__name__ == name
    assert set(lowbit_kernels.__all__) <= set(dir(lowbit_kernels))
    with pytest.raises(AttributeError, match="has no attribute 'QConv2d'"):
        _ = lowbit_kernels.QConv2d


def run(script, **env):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)} | env,
    )


def test_importing_loads_neither_triton_nor_transformers():
    done = run(
        """
        import sys
        import torch
        before = set(sys.modules)
        import lowbit_kernels
        heavy = {"triton", "transformers", "rich", "typer", "safetensors"}
        print(sorted(heavy & {name.split(".")[0] for name in set(sys.modules) - before}))
        """
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_reference_runs_where_triton_cannot_be_imported():
    done = run(
        """
        import sys
        sys.modules["triton"] = None  # any import of it raises
        import torch
        from lowbit_kernels import QLinear, QConv1d, flash_attention
        QLinear(64, 8)(torch.randn(2, 64)).sum().backward()
        QConv1d(8, 8, 3)(torch.randn(2, 8, 9)).sum().backward()
        flash_attention(*torch.randn(3, 1, 2, 5, 8))
        print("ok")
        """
    )
    assert done.stdout.strip() == "ok", done.stderr


def test_the_changelog_has_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    heading = rf"^## \[?{re.escape(project['version'])}"
    assert re.search(heading, (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_readme_shows_the_call_early():
    lines = (ROOT / "README.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines, 1) if "quantize(model" in line)
    assert first <= 15


def test_the_readme_examples_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
