"""What holds of the code itself."""

import ast
from collections.abc import Iterator
from pathlib import Path

import trio_pilot

PACKAGE = Path(trio_pilot.__file__).parent


def functions() -> Iterator[tuple[str, int]]:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.name}:{node.name}", (node.end_lineno or 0) - node.lineno + 1


def test_every_function_has_fewer_than_forty_lines() -> None:
    assert [(name, lines) for name, lines in functions() if lines >= 40] == []


def modules_that_import(library: str) -> set[str]:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == library for name in names):
                found.add(str(path.relative_to(PACKAGE)))
    return found


def test_each_foreign_library_is_imported_in_one_place() -> None:
    assert modules_that_import("pika") == {"brokers/amqp.py"}
    assert modules_that_import("sqlite3") == modules_that_import("inotify_simple") == {"brokers/local.py"}
    assert modules_that_import("pulsar") == {"brokers/pulsar_session.py"}
    assert modules_that_import("zstandard") == {"wire.py"}
    assert modules_that_import("htchirp") == {"condor/chirp.py"}
    assert modules_that_import("cyclopts") == {"cli.py"}


def test_the_pilot_knows_neither_brokers_nor_commands() -> None:
    for node in ast.walk(ast.parse((PACKAGE / "pilot.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.module not in (
                "trio_pilot.brokers.local",
                "trio_pilot.brokers.rabbitmq",
                "trio_pilot.cli",
                "trio_pilot.program",
            )
