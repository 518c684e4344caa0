"""Which rooms may import which: imports point downwards, and no circle of imports exists."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rayk"

# Each floor may use the floors above it in this list; rooms on one floor do not import each other.
FLOORS = [
    {"errors", "environment"},
    {"config"},
    {"storage", "text"},
    {"models"},
    {"signals"},
    {"losses"},
    {"engines", "data"},
    {"serving"},
    {"teachers"},
    {"evaluation", "rollouts", "synthesis", "retrieval"},
    {"methods", "report"},
    {"training"},
    {"run"},
    {"commands"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
WITHOUT_RAY = {room for rooms in FLOORS[:7] for room in rooms}


def room_of(module: str) -> str:
    return module.split(".")[1]


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        if name != "rayk":
            found[name] = path
    return found


def imports(path: Path) -> set[str]:
    """Every module named in an import statement, at the top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_room_has_a_floor():
    assert {room_of(module) for module in modules()} == set(FLOOR_OF)


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_downwards(module):
    for name in imports(modules()[module]):
        if name.startswith("rayk.") and room_of(name) in FLOOR_OF and room_of(name) != room_of(module):
            assert FLOOR_OF[room_of(name)] < FLOOR_OF[room_of(module)], f"{module} imports {name}"


def test_no_circle_of_imports():
    """Type-only imports and imports inside functions count too."""
    found = modules()
    edges = {
        name: {
            next((each for each in (target, target.rpartition(".")[0]) if each in found), name)
            for target in imports(path)
        }
        - {name}
        for name, path in found.items()
    }
    while removable := [name for name, targets in edges.items() if not targets & edges.keys()]:
        for name in removable:
            del edges[name]
    assert not edges, {name: sorted(targets & edges.keys()) for name, targets in edges.items()}


def test_the_lower_floors_name_ray_nowhere():
    for module, path in modules().items():
        if room_of(module) in WITHOUT_RAY:
            assert not {name for name in imports(path) if name.split(".")[0] == "ray"}, module


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_actor_that_knows_the_weights_waits_for_no_torch():
    assert "loaded: []" in run_python(
        "import sys, rayk.serving.weight_store\nprint('loaded:', sorted({'torch', 'transformers'} & set(sys.modules)))"
    )


def test_the_lower_floors_work_where_ray_is_not_installed():
    names = sorted(module for module in modules() if room_of(module) in WITHOUT_RAY)
    run_python(
        f"import sys, importlib\nsys.modules['ray'] = None\nfor name in {names!r}: importlib.import_module(name)"
    )


@pytest.mark.parametrize(
    "code", ["import rayk.config", "import rayk; rayk.RunConfig", "import sys; sys.argv = ['rayk', '--help']\n"
             "import rayk.cli\ntry: rayk.cli.main()\nexcept SystemExit: pass"], ids=["config", "rayk", "help"],
)  # fmt: skip
def test_settings_and_help_need_neither_torch_nor_ray(code):
    out = run_python(
        f"{code}\nimport sys\nprint('loaded:', sorted({{'torch', 'ray', 'transformers'}} & set(sys.modules)))"
    )
    assert "loaded: []" in out
