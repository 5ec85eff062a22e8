"""The folders of the package and who may import whom, read from the sources: downwards only, as in LAYERS."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "vae_ray"
LAYERS = [
    {"errors", "version", "machine"},
    {"storage"},
    {"config"},
    {"seeds", "arguments"},
    {"data"},
    {"parallel"},
    {"models"},
    {"objectives"},
    {"run_files"},
    {"checkpoints"},
    {"evaluation"},
    {"training"},
    {"signals"},
    {"distributed", "inference"},
    {"cluster"},
    {"runs"},
    {"report"},
    {"tuning", "reproduction"},
    {"cli"},
    {"__main__"},
]
HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(module: Path) -> str:
    return str(module.relative_to(REPOSITORY))


def room_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree_of(module: Path) -> ast.Module:
    return ast.parse(module.read_text(encoding="utf-8"))


def imported(node: ast.AST) -> Iterator[str]:
    """Dotted names of what `node` imports, if it does."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        assert node.module is not None
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of(module: Path) -> set[str]:
    return {name for node in ast.walk(tree_of(module)) for name in imported(node)}


def imports_when_loaded(module: Path) -> set[str]:
    """What is imported as soon as `module` is: not inside functions, not for type checkers alone."""
    found: set[str] = set()
    waiting: list[ast.AST] = [tree_of(module)]
    while waiting:
        node = waiting.pop()
        found.update(imported(node))
        is_type_checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not is_type_checking and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))
    return found


def test_every_room_has_its_place() -> None:
    assert {room_of(module) for module in MODULES} - {"__init__"} <= set(HEIGHT)


# The facade `vae_ray/__init__.py` names classes of all rooms.
@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) != "__init__"], ids=name_of)
def test_rooms_are_imported_downwards_only(module: Path) -> None:
    ours = [name.split(".") for name in imports_of(module) if name.split(".")[0] == "vae_ray"]
    here = room_of(module)
    upwards = [".".join(name) for name in ours if name[1] != here and HEIGHT.get(name[1], len(LAYERS)) >= HEIGHT[here]]
    assert upwards == []


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_only_distributed_cluster_and_tuning_import_ray(module: Path) -> None:
    if room_of(module) not in ("distributed", "cluster", "tuning"):
        assert [name for name in imports_of(module) if name.split(".")[0] == "ray"] == []


LIGHT = {
    *("errors", "storage.reading", "storage.locations", "signals", "cli", "cli.main", "cli.commands", "config"),
    *(f"config.{name}" for name in ("experiment", "fields", "keys", "migration", "sections", "user_code")),
    *(f"config.sections.{file.stem}" for file in (PACKAGE / "config" / "sections").glob("[a-z]*.py")),
}


@pytest.mark.parametrize("name", ["__main__", *sorted(LIGHT)])
def test_light_modules_load_no_heavy_library(name: str) -> None:
    """Nor a module of ours that would; `cli` loads those when a command runs."""
    module = PACKAGE / f"{name.replace('.', '/')}.py"
    module = module if module.exists() else module.with_suffix("") / "__init__.py"
    for imported_name in imports_when_loaded(module):
        top, _, rest = imported_name.partition(".")
        assert top not in {"torch", "ray", "numpy", "pyarrow", "torchvision", "sklearn", "PIL", "rich"}, imported_name
        assert top != "vae_ray" or any(f"{rest}.".startswith(f"{light}.") for light in LIGHT), imported_name


def test_trained_models_need_none_of_what_trains_them_in_parallel() -> None:
    reachable, waiting = set(), ["inference"]
    while waiting:
        room = waiting.pop()
        reachable.add(room)
        files = [module for module in MODULES if room_of(module) == room]
        names = {name.split(".")[1] for file in files for name in imports_of(file) if name.startswith("vae_ray.")}
        waiting += names - reachable
    assert reachable & {"runs", "distributed", "cluster", "tuning", "cli"} == set()
    assert {"models", "evaluation", "data"} <= reachable


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_public_functions_and_classes_are_documented(module: Path) -> None:
    tree = tree_of(module)
    public = [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    undocumented = [node.name for node in public if not ast.get_docstring(node)]
    assert undocumented == []
    assert ast.get_docstring(tree)


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_only_the_command_line_prints(module: Path) -> None:
    """stdout belongs to the answer of a command."""
    calls = [node for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call)]
    prints = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert room_of(module) == "cli" or prints == []


@pytest.mark.parametrize("job", sorted((REPOSITORY / "jobs").glob("*.py")), ids=name_of)
def test_a_job_is_one_call_of_the_command_line(job: Path) -> None:
    ours = {name for name in imports_of(job) if name.split(".")[0] == "vae_ray"}
    assert ours == {"vae_ray.cli.main.run"}
    assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(tree_of(job)))


@pytest.mark.parametrize(
    ("mark", "directories"),
    [("ray", {"distributed", "parallel", "faults"}), ("cluster", {"cluster"}), ("system", {"system"})],
)
def test_tests_with_a_mark_are_where_make_looks_for_them(mark: str, directories: set[str]) -> None:
    marked = re.compile(rf"^(pytestmark = |@).*\bpytest\.mark\.{mark}\b", re.MULTILINE)
    tests = REPOSITORY / "tests"
    files = [file.relative_to(tests) for file in tests.rglob("test_*.py") if marked.search(file.read_text())]
    assert {file.parts[0] for file in files} == directories


# Where packages are installed from is each machine's own affair, and never the repository's.
REGISTRY = re.compile(r"index-url|pythonhosted\.org|pypi\.org/simple|artifactory|nexus|jfrog|devpi", re.IGNORECASE)


def test_no_tracked_file_names_a_package_registry() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    tracked = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    texts = {file: file.read_bytes().decode(errors="replace") for file in tracked if file.is_file()}
    texts.pop(Path(__file__).resolve(), None)  # it has the pattern itself
    assert len(texts) > 30
    assert [name_of(file) for file, text in texts.items() if REGISTRY.search(text)] == []
