"""The house: imports point down, every public thing says what it is, files stay small, nothing names a machine."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter import configuration
from importlinter.application import use_cases

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "graftlm"
MODULES = sorted(SOURCE.rglob("*.py"))
MAX_LINES, MAX_FUNCTION_LINES = 400, 70
EMPTY_NAMES = ("utils", "helpers", "common", "misc", "manager", "handler")
# Put together here so that this file does not name them itself.
REGISTRIES = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"), ("registry", "npmjs", "org"),
        ("anaconda", "org"),
    )
]  # fmt: skip
MACHINE_PATHS = [re.compile("/" + top + r"/\w") for top in ("work", "home", "root", "Users")]


def tracked_texts() -> Iterator[tuple[str, str]]:
    """Every text file of the project; untracked files are not yet its own."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and not name.startswith("examples/data/"):
            try:
                yield name, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Public functions and classes of a module, and public methods of its public classes.

    The methods of a protocol are told by its own docstring.
    """
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef) and "Protocol" not in [ast.unparse(base) for base in node.bases]:
                for member in node.body:
                    if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                        yield member


def test_imports_point_down() -> None:
    """The contract of pyproject.toml, through import-linter itself; what is broken is printed."""
    configuration.configure()
    assert use_cases.lint_imports(config_filename=str(ROOT / "pyproject.toml"), cache_dir=None, no_logo=True)


def test_every_room_stands_in_the_contract() -> None:
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("layers = [")[1].split("]")[0]
    listed = set(re.findall(r"\w+", contract))
    rooms = {path.stem if path.is_file() else path.name for path in SOURCE.iterdir() if not path.name.startswith("_")}
    assert rooms <= listed, f"not in the contract: {sorted(rooms - listed)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_modules_and_public_things_say_what_they_are(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module has no docstring"
    silent = [node.name for node in definitions(tree) if not ast.get_docstring(node)]
    assert not silent, f"no docstring: {silent}"


def test_files_and_functions_stay_small() -> None:
    crowded = []
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > MAX_LINES:
            crowded.append(f"{path.name}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > MAX_FUNCTION_LINES:
                crowded.append(f"{path.name}: {node.name} {node.end_lineno - node.lineno} lines")
    assert not crowded


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert not [path.name for path in MODULES if any(word in path.stem for word in EMPTY_NAMES)]


def test_nothing_names_a_package_registry_or_a_place_of_one_machine() -> None:
    """U3: set-up works with whatever index pip is told of."""
    found = []
    for name, text in tracked_texts():
        found += [f"{name}: {host}" for host in REGISTRIES if host in text]
        found += [f"{name}: {match[0]}" for pattern in MACHINE_PATHS for match in pattern.finditer(text)]
    assert not found


def test_no_weights_are_kept() -> None:
    kept = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".model", ".parquet", ".whl")
    names = [name for name, _ in tracked_texts() if name.endswith(kept)]
    assert not names


def test_no_two_tests_are_called_alike() -> None:
    """pytest takes files of one name in folders that are no packages for one module."""
    names = [path.name for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    assert not [name for name in set(names) if names.count(name) > 1]
