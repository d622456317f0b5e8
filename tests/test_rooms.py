"""Who may import whom: each room stands on a floor, and imports from lower ones alone."""

import ast
import re
from pathlib import Path

import lora_inject

# The rooms from the ground up. A room is a sub-package or a file directly in the package.
FLOORS = [
    {"errors", "compat", "printing"},
    {"own", "sharding", "arithmetic"},
    {"variants"},
    {"starts"},
    {"settings"},
    {"kinds", "changes"},
    {"core"},
    {"merging", "report"},
    {"training", "capacity", "plan"},
    {"inject", "adapters", "files"},
    {"calibration"},
    {"audit"},
    {"integrations", "cli"},
    {"__main__", "__init__"},
]
PACKAGE = Path(lora_inject.__file__).parent


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path):
    """The rooms that a file imports from, wherever in it that is."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            if node.module and node.module.split(".")[0] == "lora_inject":
                first = node.module.split(".")[1:2]
                yield from first or [alias.name for alias in node.names]


def test_every_room_has_a_floor():
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")}
    assert rooms == set().union(*FLOORS)
    assert sum(map(len, FLOORS)) == len(rooms)


def test_imports_go_downwards():
    floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
    upwards = [
        f"{path.relative_to(PACKAGE)} -> {other}"
        for path in PACKAGE.rglob("*.py")
        for other in imported_rooms(path)
        if other != room_of(path) and floor[other] >= floor[room_of(path)]
    ]
    assert upwards == []


def test_the_map_names_every_file_of_the_core():
    reading = (PACKAGE / "README.md").read_text().split("A newcomer reads `core/`")[1]
    files = {path.stem for path in (PACKAGE / "core").glob("*.py")} - {"__init__"}
    assert set(re.findall(r"`(\w+)`", reading)) == files
