"""Who may import whom: the arrows of the design, read from the sources."""

import ast
import importlib.util
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "kto_dist").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
LAUNCH = sorted((ROOT / "launch").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))

# From the bottom up: a module imports from its own layer and from those below. A module that is not here (a new one)
# is held by the other rules alone.
LAYERS = (
    {"errors", "config", "files", "class_weights", "theme"},
    {"comm", "sources", "formats", "examples", "data", "batch", "feedback", "audited", "console"},
    {"environment", "tracking_uri", "mlmodel", "plots", "storage", "hashes", "shards", "fingerprint"},
    {"causal_lm", "metrics", "objective", "models", "store", "keys", "prefix", "store_tools", "reference", "checkpoint"}
    | {"tracking", "health", "report"},
    {"evaluate", "compare", "plan", "pass_record", "prepare", "score", "precompute", "train"},
    {"launcher", "entry", "store_cli", "cli"},
)


@cache
def imports(path: Path, *, lazy: bool = True) -> frozenset[str]:
    """Dotted names that a file imports; `from a import b` counts as a and a.b. `lazy`: also inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found, queue = set(), [tree]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative
                package = path.relative_to(ROOT).parts[:-1][: len(path.relative_to(ROOT).parts) - node.level]
                base = ".".join([*package, base] if base else package)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        if lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            queue += ast.iter_child_nodes(node)
    return frozenset(found)


def roots(path):
    return {name.partition(".")[0] for name in imports(path)}


def module_of(path):
    parts = path.relative_to(ROOT / "kto_dist").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in PACKAGE}


def neighbours(path, *, lazy=True):
    """Modules of kto_dist that a file imports (without the package itself)."""
    names = {name.removeprefix("kto_dist.") for name in imports(path, lazy=lazy) if name.startswith("kto_dist.")}
    return {name for name in names if name in MODULES}


def layer(module):
    return next((number for number, names in enumerate(LAYERS) if module.partition(".")[0] in names), None)


def named(paths):
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


def taken_names(path):
    """(module, name) for all that a file imports by name from the project's packages, also inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("kto_dist", "kto_kernels")
        for alias in node.names
    ]


@pytest.mark.parametrize("path", named(LAUNCH + BENCHMARKS))
def test_what_scripts_import_is_there(path):
    """No test runs the demo or a benchmark whole."""
    for module, name in taken_names(path):
        found = importlib.import_module(module)
        assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), f"{module} has no {name}"


@pytest.mark.parametrize("path", named(KERNELS))
def test_kernels_import_torch_triton_and_each_other_alone(path):
    assert roots(path) <= {"torch", "triton", "kto_kernels"} | sys.stdlib_module_names


@pytest.mark.parametrize("path", named(p for p in PACKAGE + LAUNCH if p.name != "models.py"))
def test_deepspeed_is_imported_in_models_alone(path):
    assert "deepspeed" not in roots(path)


@pytest.mark.parametrize("path", named(p for p in PACKAGE + LAUNCH if p.name != "tracking.py"))
def test_mlflow_is_imported_in_tracking_alone(path):
    assert "mlflow" not in roots(path)


def test_models_and_tracking_are_where_the_two_rules_above_look():
    assert "deepspeed" in roots(MODULES["models"]) and "mlflow" in roots(MODULES["tracking"])


@pytest.mark.parametrize("module", [module for module in MODULES if layer(module) is not None])
def test_arrows_point_down(module):
    above = {other for other in neighbours(MODULES[module]) if (layer(other) or 0) > layer(module)}
    assert not above, f"{module} imports {above}, which stand above it"


@pytest.mark.parametrize("module", ("objective", "metrics", "causal_lm", "batch", "data"))
def test_the_mathematics_know_nothing_of_ranks(module):
    reached, queue = set(), [module]
    while queue:
        for other in neighbours(MODULES[queue.pop()]) - reached:
            reached.add(other)
            queue.append(other)
    assert not reached & {"comm", "models", "tracking"}
    assert not any(name.startswith("torch.distributed") for name in imports(MODULES[module]))


def test_there_is_no_cycle_of_imports():
    seen, path = set(), []

    def visit(module):
        assert module not in path, f"{' -> '.join([*path[path.index(module) :], module])}"
        if module in seen:
            return
        path.append(module)
        for other in sorted(neighbours(MODULES[module], lazy=False)):
            visit(other)
        path.pop()
        seen.add(module)

    for module in MODULES:
        visit(module)


@pytest.mark.parametrize("path", named(path for path in LAUNCH if path.parent.name == "launch"))
def test_entry_points_reach_the_package_by_its_entry_alone(path):
    assert neighbours(path) <= {"entry"}


def test_help_needs_no_torch():
    code = (
        "import sys, kto_dist.cli\n"
        "kto_dist.cli.main(['--help'], standalone_mode=False)\n"
        "print('heavy:', sorted({'torch', 'transformers', 'deepspeed', 'mlflow'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: []" in result.stdout


def test_importing_the_package_needs_no_torch():
    code = "import sys, kto_dist; kto_dist.Config; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_kernels_is_no_package():
    # it would shadow the PyPI package `kernels`, which transformers imports
    assert not list((ROOT / "kernels").glob("__init__.py*"))


def test_nothing_is_left_unfinished():
    marks = ("NotImplemented" + "Error", "TO" + "DO", "FIX" + "ME", "X" * 3)
    folders = ("kto_dist", "kernels", "launch", "tests", "benchmarks")
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    found = [
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for file in files
        for line in file.read_text(encoding="utf-8").splitlines()
        if any(mark in line for mark in marks)
    ]
    assert not found
