"""The shape of the package: how many modules, how large a room, who imports whom. docs/architecture.md explains it."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
MOST_MODULES = 200
MOST_FILES_IN_A_ROOM = 26
MOST_WITH_ONE_IMPORTER = 15
# Here every file stands for one task, command, patch or format, and a table imports it.
ONE_OF_A_KIND = {"tasks", "cli", "patches", "formats"}
# Duties that mlx alone has.
MLX_ALONE = {
    "blas": "MLX on Linux is given a fast BLAS before it is imported; torch brings its own",
    "families": "mlx-lm's model classes differ from transformers', which torch uses itself",
    "patches": "where mlx-lm's model code computes something else than transformers'",
    "reading": "torch has its config read by transformers itself",
    "quantization": "mlx reads the packed formats itself; for torch, transformers and bitsandbytes do",
    "rope": "mlx-lm's rotary embeddings are rebuilt for stretched positions; transformers has them",
}


def modules() -> dict[str, Path]:
    """Dotted name below soup_xb -> file, without the packages' own `__init__`."""
    files = sorted((ROOT / "soup_xb").rglob("*.py"))
    return {_name(file): file for file in files if file.name != "__init__.py"}


def _name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT / "soup_xb").with_suffix("").parts)


def imports(tree: ast.AST, known: Mapping[str, object]) -> Iterator[str]:
    """The modules of the package that a tree imports anywhere: at the top, in a function, or for types alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [entry.name for entry in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` names the module second.
            names = [f"{node.module}.{entry.name}" for entry in node.names] + [node.module]
        else:
            continue
        yield from (short for name in names if (short := name.removeprefix("soup_xb.")) in known)


def graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports."""
    known = modules()
    trees = {name: ast.parse(file.read_text("utf-8")) for name, file in known.items()}
    return {name: {other for other in imports(tree, known) if other != name} for name, tree in trees.items()}


def in_circles(edges: Mapping[str, set[str]]) -> set[str]:
    """What is left when modules that import nothing left, or that nothing left imports, are taken away in turn."""
    left = set(edges)
    while True:
        imported = {other for name in left for other in edges[name]}
        free = {name for name in left if not edges[name] & left or name not in imported}
        if not free:
            return left
        left -= free


def with_one_importer(edges: Mapping[str, set[str]]) -> dict[str, str]:
    """Modules that one other module of their room imports, and nobody else -> that module."""
    importers = defaultdict(list)
    for name, others in edges.items():
        for other in others:
            importers[other].append(name)
    alone = {name: found[0] for name, found in importers.items() if len(found) == 1}
    return {
        name: by
        for name, by in alone.items()
        if _room(name) == _room(by) and not ONE_OF_A_KIND & set(name.split("."))
    }


def _room(name: str) -> str:
    return name.rpartition(".")[0]


def test_modules_are_few_and_rooms_are_small() -> None:
    assert len(modules()) <= MOST_MODULES
    sizes = Counter(_room(name) for name in modules())
    assert {room: size for room, size in sizes.items() if size > MOST_FILES_IN_A_ROOM} == {}


def test_no_module_imports_itself_on_a_way_round() -> None:
    """Imports inside functions, and those for type checkers, count too."""
    assert in_circles(graph()) == set()


def test_a_circle_would_be_seen() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert in_circles(edges) == {"b", "c"}
    tree = ast.parse(
        "def f():\n    from soup_xb.core import disk\nif TYPE_CHECKING:\n    import soup_xb.core.text"
    )
    assert set(imports(tree, {"core.disk": 0, "core.text": 0})) == {"core.disk", "core.text"}


def test_a_module_with_one_importer_has_its_reason_in_the_docs() -> None:
    page = PAGE.read_text("utf-8")
    alone = with_one_importer(graph())
    assert len(alone) <= MOST_WITH_ONE_IMPORTER, sorted(alone)
    assert [name for name in sorted(alone) if f"| `{name}` |" not in page] == []


def test_the_docs_name_no_module_that_is_gone_or_has_more_importers() -> None:
    rows = re.findall(r"^\| `([a-z_]+(?:\.\w+)+)` \|", PAGE.read_text("utf-8"), re.MULTILINE)
    assert rows
    assert [name for name in rows if name not in with_one_importer(graph())] == []


def test_the_same_duty_has_the_same_file_name_in_both_backends() -> None:
    duties = {
        backend: {name.rpartition(".")[2] for name in modules() if _room(name) == f"backends.{backend}"}
        for backend in ("torch", "mlx")
    }
    assert duties["mlx"] - duties["torch"] == set(MLX_ALONE)


def test_every_room_is_in_the_docs() -> None:
    page = PAGE.read_text("utf-8")
    rooms = {"soup_xb/" + _room(name).replace(".", "/") for name in modules() if _room(name)}
    assert [room for room in sorted(rooms) if f"`{room}/`" not in page] == []
