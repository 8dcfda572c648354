"""The rules of the code base that a reader relies on, checked on the source itself."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "rlhf_jax"
MAX_LINES = 330

# Imports point from a higher number to a lower one, or stay at the same height.
HEIGHTS = {
    "experiments": 5,
    "stages": 4,
    "training": 3,
    "data": 3,
    "evaluation": 3,
    "interop": 3,
    "objectives": 2,
    "nn": 1,
}
PURE = ("nn", "objectives")
PURE_IMPORTS = {"jax", "flax.struct", "optax", "chex"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path
    for folder in (PACKAGE, "experiments")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
MODULES = [name for name in SOURCES if name.startswith(PACKAGE)]
PURE_MODULES = [
    name
    for name in MODULES
    if name.startswith(tuple(f"{PACKAGE}.{room}." for room in PURE))
]


def room(module: str) -> str | None:
    """The folder of rules a module belongs to; None for what lies outside them."""
    parts = module.split(".")
    if parts[0] == "experiments":
        return "experiments"
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def imports(tree: ast.AST) -> list[str]:
    """Dotted names of everything imported, at any depth: module or module.name."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def upward(module: str, tree: ast.AST) -> list[str]:
    """Imports of `module` that break the arrow rule."""
    height = HEIGHTS[room(module)] if room(module) in HEIGHTS else None
    broken = []
    for name in imports(tree):
        target = room(name)
        if target is None or height is None:
            continue
        if HEIGHTS[target] > height:
            broken.append(name)
    return broken


def foreign(tree: ast.AST) -> list[str]:
    """Imports that a pure module may not have."""
    return [
        name
        for name in imports(tree)
        if name.split(".")[0] not in (PACKAGE, *sys.stdlib_module_names)
        and not any(f"{name}.".startswith(f"{ok}.") for ok in PURE_IMPORTS)
    ]


def shifted_sets(tree: ast.AST) -> list[int]:
    """Lines of `x.at[1:].set(x[:-1])` and its like: a slice of x from a slice of x."""
    lines = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(
                    value=ast.Subscript(
                        value=ast.Attribute(value=base, attr="at"), slice=where
                    )
                ),
                args=[ast.Subscript(value=source, slice=what), *_],
            ) if ast.dump(base) == ast.dump(source):
                if any(isinstance(n, ast.Slice) for n in ast.walk(where)) and any(
                    isinstance(n, ast.Slice) for n in ast.walk(what)
                ):
                    lines.append(node.lineno)
    return lines


def mentions(tree: ast.AST, dotted: str) -> list[int]:
    """Lines that read the attribute `dotted`, for example `jax.pmap`."""
    owner, name = dotted.rsplit(".", 1)
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == dotted:
            lines.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and node.module == owner:
            lines += [node.lineno for alias in node.names if alias.name == name]
    return lines


def undocumented(tree: ast.Module) -> list[str]:
    """Public functions of a module whose docstring states no shape in brackets."""
    names = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            text = ast.get_docstring(node) or ""
            if "[" not in text or "]" not in text:
                names.append(node.name)
    return names


def parse(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(), SOURCES[module].name)


# ------------------------------------------------------------ the rules on our source


def test_the_walk_finds_the_code():
    assert {"rlhf_jax.nn.transformer", "rlhf_jax.objectives.ppo"} <= set(PURE_MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_stands_in_a_known_room(module):
    assert module == PACKAGE or room(module) in HEIGHTS


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down_only(module):
    assert upward(module, parse(module)) == []


def test_no_module_imports_itself_in_a_circle():
    graph = {}
    for module in SOURCES:
        names = imports(parse(module))
        targets = {
            name if name in SOURCES else name.rpartition(".")[0] for name in names
        }
        graph[module] = (targets & set(SOURCES)) - {module}
    while True:  # takes away what imports nothing and what nothing imports
        inner = {m: targets & set(graph) for m, targets in graph.items()}
        imported = set().union(*inner.values())
        inner = {
            m: targets for m, targets in inner.items() if targets and m in imported
        }
        if inner == graph:
            break
        graph = inner
    assert graph == {}


@pytest.mark.parametrize("module", PURE_MODULES)
def test_pure_modules_import_jax_and_the_standard_library_only(module):
    assert foreign(parse(module)) == []


@pytest.mark.parametrize("module", PURE_MODULES)
def test_pure_modules_leave_compiling_and_the_world_to_their_callers(module):
    tree = parse(module)
    assert mentions(tree, "jax.jit") == []
    calls = [
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    assert not {"open", "print", "input"} & set(calls)
    assert not {"os", "time", "random", "pathlib"} & set(imports(tree))


@pytest.mark.parametrize("module", SOURCES)
def test_no_array_is_shifted_in_place(module):
    assert shifted_sets(parse(module)) == []


@pytest.mark.parametrize("module", SOURCES)
def test_pmap_stays_in_training(module):
    assert room(module) == "training" or mentions(parse(module), "jax.pmap") == []


@pytest.mark.parametrize("module", MODULES)
def test_modules_fit_one_reading(module):
    num_lines = len(SOURCES[module].read_text().splitlines())
    assert num_lines <= MAX_LINES


@pytest.mark.parametrize("module", PURE_MODULES)
def test_public_functions_state_their_shapes(module):
    assert undocumented(parse(module)) == []


# ----------------------------------------------------------------- the rules have teeth


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rlhf_jax.nn.x", "from rlhf_jax.objectives.ppo import ppo_objective"),
        ("rlhf_jax.objectives.x", "import rlhf_jax.training.step"),
        ("rlhf_jax.data.x", "def f():\n    from rlhf_jax import stages"),
        ("rlhf_jax.stages.x", "import experiments.pretrain"),
    ],
)
def test_an_import_that_points_up_is_found(module, source):
    assert upward(module, ast.parse(source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("experiments.x", "from rlhf_jax.stages.ppo import ppo_update"),
        ("rlhf_jax.stages.x", "from rlhf_jax.nn import heads"),
        ("rlhf_jax.objectives.x", "from rlhf_jax.nn.heads import lm_logits"),
    ],
)
def test_an_import_that_points_down_passes(module, source):
    assert not upward(module, ast.parse(source))


def test_foreign_imports_are_found():
    source = (
        "import numpy\nimport jax.numpy\nfrom flax import linen, struct\nimport math"
    )
    assert foreign(ast.parse(source)) == ["numpy", "flax.linen"]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("y = x.at[1:].set(x[:-1])", True),
        ("y = x.at[:, 1:].add(x[:, :-1])", True),
        ("y = self.x.at[1:].set(self.x[:-1])", True),
        ("y = x.at[0].set(x[1])", False),
        ("y = x.at[1:].set(z[:-1])", False),
    ],
)
def test_shifts_in_place_are_found(source, found):
    assert bool(shifted_sets(ast.parse(source))) == found


@pytest.mark.parametrize("source", ["f = jax.pmap(g)", "from jax import pmap"])
def test_pmap_is_found(source):
    assert mentions(ast.parse(source), "jax.pmap") == [1]


def test_functions_without_shapes_are_found():
    source = 'def f():\n    "No shape."\ndef g():\n    "[B]"\ndef _h():\n    pass'
    assert undocumented(ast.parse(source)) == ["f"]
