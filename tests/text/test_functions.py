"""Functions and classes named in the settings are loaded, or one sentence says what is wrong."""

import sys
from collections.abc import Sized
from pathlib import Path

import pytest

from rayk.errors import InputError
from rayk.text.functions import load_class, load_function


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_shapes.py").write_text(
        "from collections.abc import Sized\n"
        "class Square(Sized):\n    def __len__(self):\n        return 4\n"
        "class Cloud(Sized):\n    pass\n"
        "class Other:\n    pass\n"
        "number = 3\n"
        "def twice(x):\n    return 2 * x\n"
    )
    Path("my_broken.py").write_text("raise RuntimeError('no luck')\n")
    yield
    for name in ("my_shapes", "my_broken"):
        sys.modules.pop(name, None)


def load_shape(path):
    return load_class(path, Sized, "shape.path", "rayk.test_shapes", "tests.Shape")


def test_functions_and_classes_in_the_current_folder_are_loaded():
    assert load_function("my_shapes:twice", "f")(2) == 4
    assert len(load_shape("my_shapes:Square")()) == 4
    assert "" not in sys.path


@pytest.mark.parametrize(
    ("load", "path", "message"),
    [
        (load_shape, "my_absent:Square", "module 'my_absent' cannot be imported: ModuleNotFoundError: .*start rayk in"),
        (load_shape, "my_broken:Square", "module 'my_broken' cannot be imported: RuntimeError: no luck; correct the"),
        (load_shape, "my_shapes:Circle", "module 'my_shapes' has no class 'Circle'; correct the name"),
        (load_shape, "my_shapes:Other", "'my_shapes:Other' is not a subclass of tests.Shape; derive the class"),
        (load_shape, "my_shapes:twice", "'my_shapes:twice' is not a subclass of tests.Shape"),
        (load_shape, "my_shapes:Cloud", "class 'my_shapes:Cloud' does not define '__len__'; add it"),
        (load_shape, "square", r"registers 'square' .* group 'rayk.test_shapes' \(registered: none\); install it"),
        (lambda path: load_function(path, "shape.path"), "my_shapes:number", "is not a function but a int"),
        (lambda path: load_function(path, "shape.path"), "my_shapes:absent", "has no function 'absent'"),
    ],
)
def test_one_sentence_says_what_cannot_be_loaded(load, path, message):
    with pytest.raises(InputError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith("shape.path: ")


def test_classes_are_loaded_by_entry_point(tmp_path):
    package = tmp_path / "my_plugin-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: my-plugin\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[rayk.test_shapes]\nsquare = my_shapes:Square\nlost = my_absent:X\n")
    sys.path.insert(0, str(tmp_path))
    try:
        assert len(load_shape("square")()) == 4
        with pytest.raises(InputError, match="entry point 'lost' cannot be loaded: ModuleNotFoundError"):
            load_shape("lost")
        with pytest.raises(InputError, match=r"\(registered: 'lost', 'square'\)"):
            load_shape("circle")
    finally:
        sys.path.remove(str(tmp_path))
