"""Who may import whom in the package, by the table of rooms in CONTRIBUTING.md.

The table is the one below the line ``| room | what is in it |``. Its rows go from the lowest room to the highest, and
its first column names a room in backticks: a folder with a slash at its end (``config/``) or a file (``report.py``). A
file imports from its own room and from rows above its own in the table, which are the lower rooms. Rooms that share a
row are siblings and do not import each other. Every file of the package belongs to the room with the longest name that
fits it, and every room that is named exists.

Imports are read with ``ast``: those at the top of a file, inside functions and under ``TYPE_CHECKING`` count alike, as
does ``import_module("...")``. ``from package.room import name`` is an import of ``room/name.py`` if there is such a
file, and of ``room/__init__.py`` otherwise.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
HEAD = "| room | what is in it |"
LIGHTNING = {"lightning", "lightning_fabric", "pytorch_lightning"}
WITH_LIGHTNING = ("callbacks/", "ascend/", "commands/", "protocols.py")
# typing_extensions comes with torch.
OF_TORCH = {"torch", "typing_extensions", "filelock", *sys.stdlib_module_names}
WITH_TORCH_ONLY = ("quantizers/", "layer_types.py", "targets/")
MOST_FILES = 12


class Import(NamedTuple):
    """An import statement; ``target`` is a file of the package, or the name of a foreign module."""

    file: str
    line: int
    target: str


@dataclass(frozen=True)
class Package:
    """The files of a package and the rooms that they are in."""

    folder: Path
    rows: tuple[tuple[str, ...], ...]

    @property
    def files(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.py"))

    def imports(self) -> Iterator[Import]:
        """Yield the imports of all files, of each file in the order of its lines."""
        for file in self.files:
            tree = ast.parse((self.folder / file).read_text())
            found = {
                Import(file, node.lineno, self._file_of(name))
                for node in ast.walk(tree)
                for name in _imported(node, self._parents(file))
            }
            yield from sorted(one for one in found if one.target != file)

    def own_imports(self) -> list[Import]:
        return [found for found in self.imports() if found.target.endswith(".py")]

    def foreign_imports(self) -> list[Import]:
        return [found for found in self.imports() if not found.target.endswith(".py")]

    def row_of(self, file: str) -> int | None:
        room = self.room_of(file)
        return next((number for number, row in enumerate(self.rows) if room in row), None)

    def room_of(self, file: str) -> str | None:
        rooms = [room for row in self.rows for room in row]
        fitting = [room for room in rooms if file == room or (room.endswith("/") and file.startswith(room))]
        return max(fitting, key=len, default=None)

    def _parents(self, file: str) -> list[str]:
        """Return the names of the packages that a file is in, the innermost last; relative imports begin there."""
        return [self.folder.name, *file.split("/")[:-1]]

    def _file_of(self, name: str) -> str:
        """Return the file of a dotted name: that of a module, of a package, or of what defines the name."""
        package, *parts = name.split(".")
        if package != self.folder.name:
            return name
        for end in range(len(parts), -1, -1):
            path = "/".join(parts[:end])
            for file in (f"{path}.py", f"{path}/__init__.py".lstrip("/")):
                if (self.folder / file).is_file():
                    return file
        raise LookupError(f"{name} is not in {self.folder}")


def _imported(node: ast.AST, parents: list[str]) -> list[str]:
    """Return the dotted names that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        begin = [*parents[: len(parents) + 1 - node.level]] if node.level else []
        return [".".join([*begin, *filter(None, [node.module]), alias.name]) for alias in node.names]
    if isinstance(node, ast.Call) and re.fullmatch(r"(importlib\.)?import_module|__import__", ast.unparse(node.func)):
        return [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return []


def read_rows(text: str) -> tuple[tuple[str, ...], ...]:
    """Read the first column of the table of rooms."""
    _, found, table = text.partition(f"{HEAD}\n|---|---|\n")
    assert found, f"CONTRIBUTING.md has no table with the head {HEAD}"
    lines = table.splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return tuple(tuple(re.findall(r"`([^`]+)`", line.split("|")[1])) for line in lines[:end])


def circles(package: Package) -> Iterator[str]:
    """No file imports itself by way of others."""
    graph: dict[str, set[str]] = {file: set() for file in package.files}
    for found in package.own_imports():
        graph[found.file].add(found.target)
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = list(reversed(error.args[1]))  # graphlib lists who is imported before who imports it
            yield " -> ".join(circle)
            graph[circle[0]].discard(circle[1])  # so that the next circle is another one
        else:
            return


def upward_imports(package: Package) -> Iterator[str]:
    """No file imports from a higher room, or from a sibling of its own."""
    for found in package.own_imports():
        own, other = package.row_of(found.file), package.row_of(found.target)
        rooms = package.room_of(found.file), package.room_of(found.target)
        if own is None or other is None or own > other or rooms[0] == rooms[1]:
            continue
        why = "is its sibling" if own == other else "is higher"
        yield f"{found.file}:{found.line} imports {found.target}: {rooms[1]} {why}"


def untrue_rows(package: Package) -> Iterator[str]:
    """Every file is in a room of the table, and every room of the table is there."""
    yield from (f"{file} is in no room of the table" for file in package.files if package.row_of(file) is None)
    rooms = [room for row in package.rows for room in row]
    yield from (f"{room} is in the table and does not exist" for room in rooms if not (package.folder / room).exists())
    yield from (f"{room} is in the table more than once" for room in sorted(set(rooms)) if rooms.count(room) > 1)


def lightning_elsewhere(package: Package) -> Iterator[str]:
    """Lightning is imported in a few rooms only."""
    for found in package.foreign_imports():
        if found.target.split(".")[0] in LIGHTNING and not _is_in(found.file, WITH_LIGHTNING):
            yield f"{found.file}:{found.line} imports {found.target}; only {', '.join(WITH_LIGHTNING)} may"


def more_than_torch(package: Package) -> Iterator[str]:
    """The lowest rooms need torch, the standard library and nothing else, of the package neither."""
    for found in package.imports():
        if not _is_in(found.file, WITH_TORCH_ONLY):
            continue
        room = package.room_of(found.file)
        own = found.target.endswith(".py") and package.room_of(found.target) == room
        if not own and found.target.split(".")[0] not in OF_TORCH:
            yield f"{found.file}:{found.line} imports {found.target}; {room} may import torch only"


def full_folders(package: Package) -> Iterator[str]:
    """No folder has too many files to be looked through."""
    for folder in sorted({package.folder, *(path.parent for path in package.folder.rglob("*.py"))}):
        count = sum(path.is_file() for path in folder.iterdir())
        if count > MOST_FILES:
            yield f"{folder.relative_to(package.folder.parent)}/ has {count} files; at most {MOST_FILES} are allowed"


def _is_in(file: str, rooms: tuple[str, ...]) -> bool:
    return any(file == room or (room.endswith("/") and file.startswith(room)) for room in rooms)


Rule = Callable[[Package], Iterator[str]]
RULES: tuple[Rule, ...] = (
    circles,
    upward_imports,
    untrue_rows,
    lightning_elsewhere,
    more_than_torch,
    full_folders,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rules(rule: Rule) -> None:
    package = Package(ROOT / "amct_lightning", read_rows((ROOT / "CONTRIBUTING.md").read_text()))
    problems = list(rule(package))
    assert not problems, "\n".join([f"{rule.__doc__} {len(problems)} broken:", *problems])


def make(folder: Path, rows: str, **files: str) -> Package:
    """Write a package; ``low__a`` is low/a.py, and a row names its rooms with spaces between."""
    for name, text in {"__init__": "", **files}.items():
        path = folder / "pkg" / f"{name.replace('__', '/') if name != '__init__' else name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for parent in path.relative_to(folder).parents[:-2]:
            (folder / parent / "__init__.py").touch()
    table = "".join(f"| {', '.join(f'`{room}`' for room in row.split())} | text |\n" for row in rows.split(";"))
    return Package(folder / "pkg", read_rows(f"{HEAD}\n|---|---|\n{table}\nA sentence with `another/` word.\n"))


@pytest.mark.parametrize(
    "text",
    [
        "from pkg.high import b",
        "import pkg.high.b",
        "from ..high.b import thing",
        "from .. import high",
        "def f():\n    from pkg.high.b import thing",
        "if TYPE_CHECKING:\n    from pkg.high.b import thing",
        "import importlib\nimportlib.import_module('pkg.high.b')",
    ],
)
def test_an_import_of_a_higher_room_is_found_wherever_it_stands(tmp_path: Path, text: str) -> None:
    package = make(tmp_path, "low/;high/;__init__.py", low__a=text, high__b="from pkg.low import a")
    (problem,) = upward_imports(package)
    assert re.fullmatch(r"low/a\.py:[12] imports high/(b|__init__)\.py: high/ is higher", problem)


def test_imports_of_lower_rooms_and_of_the_own_one_are_fine(tmp_path: Path) -> None:
    package = make(
        tmp_path, "low/;high/;__init__.py", low__a="", high__b="from pkg.low.a import c", high__d="from . import b"
    )
    assert [list(rule(package)) for rule in RULES] == [[]] * len(RULES)


def test_siblings_do_not_import_each_other(tmp_path: Path) -> None:
    package = make(tmp_path, "one.py two.py;__init__.py", one="import pkg.two", two="")
    assert list(upward_imports(package)) == ["one.py:1 imports two.py: two.py is its sibling"]


def test_a_file_may_be_a_room_of_its_own_inside_another(tmp_path: Path) -> None:
    package = make(
        tmp_path,
        "low/top.py;high/;low/;__init__.py",
        high__b="import pkg.low.top\nimport pkg.low.a",
        low__top="",
        low__a="",
    )
    assert list(upward_imports(package)) == ["high/b.py:2 imports low/a.py: low/ is higher"]


def test_every_circle_is_found(tmp_path: Path) -> None:
    package = make(
        tmp_path,
        "low/;__init__.py",
        low__a="from pkg.low.b import x",
        low__b="def f():\n    from pkg.low import c",
        low__c="from pkg.low.a import y\nfrom pkg.low.d import z",
        low__d="from .e import z",
        low__e="if TYPE_CHECKING:\n    from .d import z",
        low__f="from pkg.low import a",
    )
    found = {frozenset(circle.split(" -> ")) for circle in circles(package)}
    assert found == {frozenset({"low/a.py", "low/b.py", "low/c.py"}), frozenset({"low/d.py", "low/e.py"})}


def test_a_name_from_a_package_is_an_import_of_its_init_file(tmp_path: Path) -> None:
    package = make(tmp_path, "low/;__init__.py", low__a="from pkg.low import thing")
    (package.folder / "low/__init__.py").write_text("from pkg.low.a import thing")
    assert len(list(circles(package))) == 1


def test_a_table_that_is_not_true_is_found(tmp_path: Path) -> None:
    package = make(tmp_path, "low/;gone/;__init__.py;low/", low__a="", homeless="")
    assert list(untrue_rows(package)) == [
        "homeless.py is in no room of the table",
        "gone/ is in the table and does not exist",
        "low/ is in the table more than once",
    ]


def test_lightning_and_other_packages_are_found_in_rooms_that_do_without(tmp_path: Path) -> None:
    package = make(
        tmp_path,
        "quantizers/;low/;callbacks/;__init__.py",
        low__a="def f():\n    import lightning.pytorch as pl",
        callbacks__b="from lightning.pytorch import Trainer\nimport numpy",
        quantizers__c="import math\nimport torch\nimport numpy as np\nfrom pkg.quantizers import d\nimport pkg.low.a",
        quantizers__d="from torch import nn",
    )
    (problem,) = lightning_elsewhere(package)
    assert problem.startswith("low/a.py:2 imports lightning.pytorch; only callbacks/, ")
    assert list(more_than_torch(package)) == [
        "quantizers/c.py:3 imports numpy; quantizers/ may import torch only",
        "quantizers/c.py:5 imports low/a.py; quantizers/ may import torch only",
    ]


def test_a_folder_that_is_too_full_is_found(tmp_path: Path) -> None:
    package = make(tmp_path, "low/;__init__.py", **{f"low__a{number}": "" for number in range(MOST_FILES)})
    assert list(full_folders(package)) == ["pkg/low/ has 13 files; at most 12 are allowed"]
