"""Which part of the package may import which: each only those above it in the list."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "peft_tlora"
ORDER = [
    {"integrations"},  # private parts of others
    {"schedule", "functional", "orthogonal"},  # pure functions
    {"config"},
    {"timestep"},
    {"weights"},  # what travels
    {"layers"},
    {"combination", "regularization", "hosts"},
    {"model", "loading", "generation"},
    {"__init__"},
    {"formats"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
PRIVATE = ("torch._C", "torch.autograd._", "diffusers.loaders.lora_base", "peft.mapping")
MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def own_part(name):
    """The part that a name of the package's root is of."""
    return name if any(part_of(path) == name for path in MODULES) else "__init__"


def imports(path):
    """Modules of the package that a module imports, as paths from the package."""
    package = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = (*base, *(node.module or "").split(".")) if node.module else base
            yield from [module] if module else [(own_part(alias.name),) for alias in node.names]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_what_stands_above_its_part(path):
    level = {part: i for i, parts in enumerate(ORDER) for part in parts}
    own = part_of(path)
    for module in imports(path):
        assert level[module[0]] < level[own] or module[0] == own, f"{own} imports {module}"


def test_every_part_stands_in_the_order():
    assert {part_of(path) for path in MODULES} == set().union(*ORDER)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_private_parts_of_others_are_used_in_integrations_alone(path):
    text = path.read_text()
    if part_of(path) != "integrations":
        assert not [name for name in PRIVATE if name in text]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_is_of_one_sitting(path):
    assert len(path.read_text().splitlines()) < 300
