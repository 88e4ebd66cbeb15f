import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import pyramid_ldm

PACKAGE = Path(pyramid_ldm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# What a part may import beside itself. A part is a folder of the package, or a module at its top.
BASE = {"errors", "files", "ownership", "pictures", "randomness", "pyramid", "condition", "allocator",
        "signals", "workers"}  # fmt: skip
LOW = BASE | {"config", "nn", "serialization"}
MIDDLE = {"processes", "networks", "autoencoders", "data"}
ALLOWED = {
    "nn": set(),
    "errors": set(),
    "randomness": set(),
    "allocator": set(),
    "signals": set(),
    "workers": {"errors", "signals"},
    "files": {"errors"},
    "ownership": {"errors", "files"},
    "pictures": {"errors", "files"},
    "pyramid": {"errors", "randomness"},
    "condition": {"pyramid"},
    "config": {"errors", "pyramid"},
    "serialization": {"config", "errors", "ownership", "nn"},
    **{name: LOW for name in sorted(MIDDLE)},
    "openvino_backend": {"condition", "errors", "pyramid"},
    "pipeline": LOW | MIDDLE | {"openvino_backend"},
    "evaluation": LOW | MIDDLE | {"pipeline", "sample"},
    "sample": LOW | MIDDLE | {"pipeline", "evaluation"},
    "training": LOW | MIDDLE | {"__init__", "pipeline", "evaluation"},
    "encode": LOW | MIDDLE | {"evaluation", "training"},
    "pairs": LOW | MIDDLE | {"pipeline", "evaluation", "training"},
    "demo": LOW | MIDDLE | {"evaluation"},
    "check": LOW | MIDDLE | {"evaluation"},
    "curate": LOW | MIDDLE | {"evaluation"},
    "info": LOW | MIDDLE | {"pipeline", "training"},
}
PARTS = [*ALLOWED, "cli", "__init__", "__main__"]


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


@cache
def imports(module):
    """Modules of the package that one imports, anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in inner]
        else:
            continue
        ours = {name for name in names if name.split(".")[0] == "pyramid_ldm"}
        assert ours <= MODULES.keys(), f"{module} imports what is not there: {ours - MODULES.keys()}"
        found |= ours
    return found


def part(module):
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def test_every_part_has_its_place():
    assert len(MODULES) > 30
    assert {part(module) for module in MODULES} <= set(PARTS)


@pytest.mark.parametrize("name", ALLOWED)
def test_imports_run_one_way(name):
    members = [module for module in MODULES if part(module) == name]
    assert members
    for module in members:
        beyond = {other for other in imports(module) if part(other) not in ALLOWED[name] | {name}}
        assert not beyond, f"{module} must not import {sorted(beyond)}"


def test_only_the_command_line_imports_the_command_line():
    importers = {part(module) for module in MODULES for other in imports(module) if part(other) == "cli"}
    assert importers == {"cli", "__main__"}


def test_the_rules_are_those_of_the_design():
    """The table above against the sentences it stands for."""
    above = {"training", "encode", "sample", "evaluation", "info", "demo", "cli"}
    assert all(not ALLOWED[name] & (MIDDLE - {name} | above | {"pipeline"}) for name in MIDDLE)
    assert not ALLOWED["pipeline"] & above
    assert not ALLOWED["evaluation"] & {"training", "encode", "info", "demo"}
    assert not ALLOWED["training"] & {"encode", "sample", "info", "demo"}
    assert not any("cli" in allowed for allowed in ALLOWED.values())


def test_no_module_imports_itself_in_a_circle():
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for other in sorted(imports(module)):
                visit(other)
            path.pop()
            done.add(module)

    for module in MODULES:
        visit(module)
    assert done == MODULES.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_too_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


def loaded_after(code):
    """Top-level packages in memory after a fresh interpreter has run `code`."""
    text = f"import sys\n{code}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


def test_the_public_classes_load_without_what_only_training_needs_and_leave_pillow_as_it_is():
    loaded = loaded_after(
        "from PIL import Image, ImageFile; limit = Image.MAX_IMAGE_PIXELS; assert limit\n"
        "import pyramid_ldm as p; p.PyramidAutoencoder, p.PyramidNCSNpp, p.RectifiedFlow, p.PyramidPipeline\n"
        "import pyramid_ldm.data.images\n"
        "assert Image.MAX_IMAGE_PIXELS == limit and not ImageFile.LOAD_TRUNCATED_IMAGES"
    )
    assert {"torch", "pyramid_ldm"} <= loaded
    assert not loaded & {"torchvision", "lpips", "taming", "pytorch_lightning", "tensorboard"}


def test_the_command_line_answers_without_loading_torch():
    loaded = loaded_after("import pyramid_ldm.cli")
    assert "pyramid_ldm" in loaded
    assert not loaded & {"torch", "PIL", "torchvision"}


def test_an_unknown_attribute_is_an_attribute_error():
    assert not hasattr(pyramid_ldm, "PyramidGan")
    assert all(hasattr(pyramid_ldm, name) for name in pyramid_ldm.__all__)
