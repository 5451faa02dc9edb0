"""The layout of the package: which part may import which."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import trio_pilot

PACKAGE = Path(trio_pilot.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
# The version of the package is told anywhere; `python -m trio_pilot` is the command.
FREE = {"trio_pilot", "trio_pilot.__main__"}

# A part imports from a lower floor, and from its own package; parts on one floor know nothing of each other.
FLOORS: Mapping[str, float] = {
    "cli": 9,
    "pilot": 8,
    "condor": 8,
    "allocation": 7,
    "settings": 6,
    "testing": 6,
    "runtimes": 5,
    "brokers": 4,
    "cleanup": 4,
    "files": 3,
    "processes": 2,
    "wire": 1.5,
    "status": 1.5,
    "parsing": 1.5,
    "errors": 1,
    "log": 1,
    "grace_period": 1,
}
# What a part may not import although it lies lower.
FORBIDDEN = {
    "runtimes": {"brokers"},
    "condor": {"brokers", "runtimes", "cleanup"},
    "pilot": {"condor"},
}


def imports_of(module: str) -> Iterator[str]:
    """List the modules of the package that a module imports anywhere in it, by name or by a string."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{module} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in names if name.startswith("trio_pilot"))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("trio_pilot."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in MODULES:
            yield node.value


def part_of(module: str) -> str:
    return module.split(".")[1]


IMPORTS = {module: set(imports_of(module)) - FREE - {module} for module in MODULES.keys() - FREE}


def test_each_import_points_to_a_lower_floor() -> None:
    upwards = [
        f"{module} imports {other}"
        for module, others in sorted(IMPORTS.items())
        for other in sorted(others)
        if part_of(module) != part_of(other) and FLOORS[part_of(module)] <= FLOORS[part_of(other)]
    ]
    assert upwards == []


def test_no_part_imports_what_it_is_not_to_know() -> None:
    known = [
        f"{module} imports {other}"
        for module, others in sorted(IMPORTS.items())
        for other in sorted(others)
        if part_of(other) in FORBIDDEN.get(part_of(module), ())
    ]
    assert known == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names them


def test_only_what_all_parts_share_lies_at_the_root() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    shared = {"settings", "status", "wire", "errors", "log", "parsing", "grace_period", "testing"}
    assert modules == shared | {"__init__", "__main__"}


@pytest.mark.parametrize("module", ["cleanup.guardian", "cleanup.engine_containers"])
def test_the_guardian_loads_the_standard_library_and_a_few_modules(module: str) -> None:
    program = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); import trio_pilot.{module}; print(*sys.modules)"
    command = [sys.executable, "-I", "-S", "-c", program]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    own = {name for name in loaded if name.startswith("trio_pilot.")}
    foreign = {name.split(".")[0] for name in loaded} - sys.stdlib_module_names - {"trio_pilot", "__main__"}
    assert foreign == set()
    assert {part_of(name) for name in own} == {"cleanup", "files", "processes", "errors", "log"}
    assert len(own) <= 18
