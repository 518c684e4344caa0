"""The package's layers: which folder may import which, no import cycles, and no Ray or torch where none is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rayk"

# Layers from the bottom up. A folder may import those of lower layers, and none of its own layer.
LAYERS = [
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
    {"__main__"},
]
LAYER_OF = {folder: layer for layer, folders in enumerate(LAYERS) for folder in folders}
WITHOUT_RAY = {folder for folders in LAYERS[:7] for folder in folders}


def folder_of(module: str) -> str:
    return module.split(".")[1]


def find_modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        if name != "rayk":
            found[name] = path
    return found


def imported_names(path: Path) -> set[str]:
    """Return every module named in an import statement of `path`, at the top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_folder_has_a_layer():
    assert {folder_of(module) for module in find_modules()} == set(LAYER_OF)


@pytest.mark.parametrize("module", sorted(find_modules()))
def test_imports_point_to_lower_layers(module):
    for name in imported_names(find_modules()[module]):
        if name.startswith("rayk.") and folder_of(name) in LAYER_OF and folder_of(name) != folder_of(module):
            assert LAYER_OF[folder_of(name)] < LAYER_OF[folder_of(module)], f"{module} imports {name}"


def test_no_import_cycles():
    """Type-only imports and imports inside functions count too."""
    found = find_modules()
    edges = {
        name: {
            next((module for module in (target, target.rpartition(".")[0]) if module in found), name)
            for target in imported_names(path)
        }
        - {name}
        for name, path in found.items()
    }
    while removable := [name for name, targets in edges.items() if not targets & edges.keys()]:
        for name in removable:
            del edges[name]
    assert not edges, {name: sorted(targets & edges.keys()) for name, targets in edges.items()}


def test_lower_layers_do_not_import_ray():
    for module, path in find_modules().items():
        if folder_of(module) in WITHOUT_RAY:
            assert not {name for name in imported_names(path) if name.split(".")[0] == "ray"}, module


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_weight_store_starts_without_torch():
    assert "loaded: []" in run_python(
        "import sys, rayk.serving.weight_store\nprint('loaded:', sorted({'torch', 'transformers'} & set(sys.modules)))"
    )


def test_lower_layers_work_without_ray_installed():
    names = sorted(module for module in find_modules() if folder_of(module) in WITHOUT_RAY)
    run_python(
        f"import sys, importlib\nsys.modules['ray'] = None\nfor name in {names!r}: importlib.import_module(name)"
    )


@pytest.mark.parametrize(
    "code", ["import rayk.config", "import rayk; rayk.RunConfig", "import sys; sys.argv = ['rayk', '--help']\n"
             "import rayk.cli\ntry: rayk.cli.main()\nexcept SystemExit: pass"], ids=["config", "rayk", "help"],
)  # fmt: skip
def test_settings_and_help_load_neither_torch_nor_ray(code):
    out = run_python(
        f"{code}\nimport sys\nprint('loaded:', sorted({{'torch', 'ray', 'transformers'}} & set(sys.modules)))"
    )
    assert "loaded: []" in out


def test_test_files_have_different_names():
    """pytest imports test files by their base name, so of two files with one name it cannot collect the second."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
