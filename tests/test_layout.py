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
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
ALL = [ROOT / "setup.py", *PACKAGE, *KERNELS, *LAUNCH, *BENCHMARKS, *TESTS]

# The wings from the bottom up: a module imports from its own wing and from those of the floors below.
FLOORS = (
    ("base",),
    ("data", "store", "record"),
    ("feedback", "model"),
    ("objective", "reference"),
    ("evaluation",),
    ("training",),
    ("comparison", "cluster"),
    ("commands",),
)
# Below, and yet none of its business.
APART = {"feedback": {"data", "store"}}


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


def wing(module):
    return module.partition(".")[0]


def floor(module):
    return next(number for number, wings in enumerate(FLOORS) if wing(module) in wings)


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


@pytest.mark.parametrize("path", named([*LAUNCH, *BENCHMARKS, ROOT / "tests" / "ranks_preload.py"]))
def test_what_scripts_import_is_there(path):
    """No test runs the demo or a benchmark whole, and what cannot be preloaded is passed over in silence."""
    for module, name in taken_names(path):
        found = importlib.import_module(module)
        assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), f"{module} has no {name}"


def test_kernels_import_torch_triton_and_each_other_alone():
    for path in KERNELS:
        assert roots(path) <= {"torch", "triton", "kto_kernels"} | sys.stdlib_module_names, path


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("deepspeed", {"model.engines", "model.engine_files"}),
        ("mlflow", {"record.mlflow_run", "record.mlflow_store", "record.mlflow_judge"}),
    ],
)
def test_a_heavy_package_is_imported_at_home_alone(package, homes):
    users = {module for module, path in MODULES.items() if package in roots(path)}
    assert users == homes
    assert not [path for path in LAUNCH if package in roots(path)]


def test_every_module_lies_in_a_wing():
    wings = {name for wings in FLOORS for name in wings}
    assert {wing(module) for module in MODULES if module} == wings


def test_arrows_point_down():
    for module in filter(None, MODULES):
        others = neighbours(MODULES[module]) - {""}
        above = {other for other in others if floor(other) > floor(module)}
        assert not above, f"{module} imports {above}, which stand above it"
        beside = {other for other in others if floor(other) == floor(module) and wing(other) != wing(module)}
        assert not beside, f"{module} imports {beside}, which stand beside it"
        apart = {other for other in others if wing(other) in APART.get(wing(module), ())}
        assert not apart, f"{module} imports {apart}, which are not its business"


def test_every_wing_says_what_it_is_for_and_what_it_may_import():
    for name in (name for wings in FLOORS for name in wings):
        text = ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8"))) or ""
        assert "May import:" in text and "Open first:" in text, name


def test_the_mathematics_know_nothing_of_ranks():
    for module in ("objective.objective", "objective.metrics", "model.causal_lm", "data.batch", "data.tokenise"):
        reached, queue = set(), [module]
        while queue:
            for other in neighbours(MODULES[queue.pop()]) - reached:
                reached.add(other)
                queue.append(other)
        assert not reached & {"base.comm", "base.agree", "model.engines"}, module
        assert not any(wing(other) == "record" for other in reached), module
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
    assert neighbours(path) <= {"commands", "commands.entry"}


def test_help_needs_no_torch():
    code = (
        "import sys, kto_dist.commands.cli\n"
        "kto_dist.commands.cli.main(['--help'], standalone_mode=False)\n"
        "print('heavy:', sorted({'torch', 'transformers', 'deepspeed', 'mlflow'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: []" in result.stdout


def test_importing_the_package_needs_no_torch():
    code = "import sys, kto_dist; kto_dist.Config; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_data_needs_neither_deepspeed_nor_mlflow():
    modules = ", ".join(f"kto_dist.{name}" for name in MODULES if wing(name) == "data")
    code = f"import sys, {modules}; print(sorted({{'deepspeed', 'mlflow'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_kernels_is_no_package():
    # it would shadow the PyPI package `kernels`, which transformers imports
    assert not list((ROOT / "kernels").glob("__init__.py*"))


def test_nothing_is_left_unfinished():
    marks = ("NotImplemented" + "Error", "TO" + "DO", "FIX" + "ME", "X" * 3)
    found = [
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for file in ALL
        for line in file.read_text(encoding="utf-8").splitlines()
        if any(mark in line for mark in marks)
    ]
    assert not found


LONGEST_FILE, LONGEST_FUNCTION = 450, 80  # lines


def test_no_file_and_no_function_outgrows_its_bounds():
    found = []
    for path in ALL:
        text = path.read_text(encoding="utf-8")
        functions = [
            node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        sizes = [("", text.count("\n"), LONGEST_FILE)]
        sizes += [(node.name, node.end_lineno - node.lineno + 1, LONGEST_FUNCTION) for node in functions]
        found += [f"{path.relative_to(ROOT)} {name}: {lines} lines" for name, lines, most in sizes if lines > most]
    assert not found, "\n".join(found)


def private_names() -> set[str]:
    """All names with one leading underscore that the packages define: functions, classes, attributes, variables."""
    found = set()
    for path in PACKAGE + KERNELS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in found if name.startswith("_") and not name.startswith("__") and name != "_"}


def test_tests_reach_for_no_private_name_and_for_no_other_tests_file():
    private, found = private_names(), {}
    for path in TESTS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        inside = {name for _, name in taken_names(path) if name.startswith("_")}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in private - own:
                if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                    inside.add(node.attr)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
                words = [word.value for word in node.args if isinstance(word, ast.Constant)]
                if called in ("setattr", "delattr", "getattr", "patch"):
                    inside |= {word for word in words if str(word).rpartition(".")[2] in private}
        inside |= {name for name in roots(path) if name.startswith("test_")}
        if inside:
            found[path.name] = inside
    assert not found, "\n".join(map(str, found.items()))
