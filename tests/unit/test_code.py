"""Rules for the source text of the package and of its tests."""

import ast
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import trio_pilot

PACKAGE = Path(trio_pilot.__file__).parent
TESTS = Path(__file__).parents[1]

LONGEST_NAME = 70

# Words that plain technical English does without: persons for programs, and docstrings that do not begin with what is done.
NOT_PLAIN = re.compile(
    r"\b(we|us|our|ours|ourselves|nobody|somebody|whoever|Have|Be told|Be known|is none of|Tell whether|Say what|Give the)\b"
)


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
    assert modules_that_import("pika") == {f"brokers/rabbitmq_{part}.py" for part in ("connection", "channel", "properties")}
    assert modules_that_import("sqlite3") == modules_that_import("inotify_simple") == {"brokers/local.py"}
    assert modules_that_import("pulsar") == {"brokers/pulsar_connection.py"}
    assert modules_that_import("zstandard") == {"wire.py"}
    assert modules_that_import("httpx") == {"runtimes/engine_api.py"}
    assert modules_that_import("h11") == {"runtimes/engine_http.py"}
    assert modules_that_import("htchirp") == {"condor/chirp.py"}
    assert modules_that_import("cyclopts") == {"cli/app.py"}


NAMES_OF_BROKERS = re.compile(r"(?<![a-z])(rabbit|nats|pulsar|amqp|jetstream)", re.IGNORECASE)


def words_of(tree: ast.AST) -> Iterator[str]:
    """Return all names and texts in code, but not docstrings and comments."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if id(node) not in docstrings:
            yield from (value for _, value in ast.iter_fields(node) if isinstance(value, str))


def test_no_broker_is_named_outside_its_package() -> None:
    named = [
        (str(path.relative_to(PACKAGE)), word)
        for path in PACKAGE.rglob("*.py")
        if path.parent != PACKAGE / "brokers"
        for word in words_of(ast.parse(path.read_text()))
        if NAMES_OF_BROKERS.search(word)
    ]
    assert named == []


def test_the_pilot_knows_neither_brokers_nor_commands() -> None:
    for node in ast.walk(ast.parse((PACKAGE / "pilot/serve.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.module not in (
                "trio_pilot.brokers.local",
                "trio_pilot.brokers.rabbitmq",
                "trio_pilot.cli.app",
                "trio_pilot.cli.main",
            )


@pytest.mark.parametrize(
    ("module", "needed"),
    [
        ("brokers.local", {"sqlite3", "inotify_simple"}),
        ("brokers.rabbitmq", {"pika", "asyncio"}),
        ("brokers.nats", {"nats", "asyncio", "email"}),
        ("runtimes.bubblewrap", set()),
        ("runtimes.apptainer", set()),
        ("runtimes.docker", {"httpx", "email"}),
    ],
)
def test_a_run_loads_only_the_libraries_of_its_broker_and_its_runtime(module: str, needed: set[str]) -> None:
    own = "trio_pilot.cli.main, trio_pilot.cli.run, trio_pilot.cli.load_settings"
    program = f"import sys, {own}, trio_pilot.{module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    slow = {"cyclopts", "htchirp", "httpx", "inotify_simple", "nats", "pika", "pulsar", "asyncio", "email", "sqlite3"}
    assert (slow | {"difflib", "tomllib"}) & set(loaded) == needed


def names_of_tests() -> Iterator[tuple[str, str]]:
    for path in TESTS.rglob("test_*.py"):
        place = str(path.relative_to(TESTS))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                yield place, node.name


def test_the_names_of_tests_have_at_most_seventy_characters() -> None:
    assert [(place, name) for place, name in names_of_tests() if len(name) > LONGEST_NAME] == []


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of comments and strings: docstrings, log lines, help and errors are among them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from enumerate(node.value.splitlines(), node.lineno)
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string


def not_plain(path: Path) -> Iterator[str]:
    for number, text in texts(path):
        if NOT_PLAIN.search(text):
            yield f"{path.relative_to(PACKAGE)}:{number}: {text.strip()}"


def test_texts_are_in_plain_english() -> None:
    found = [line for path in sorted(PACKAGE.rglob("*.py")) for line in not_plain(path)]
    assert found == [], "\n".join(found)
