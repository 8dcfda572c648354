"""Notebooks run from top to bottom, and show the library alone."""

import ast
import sys
import warnings
from pathlib import Path

import pytest
from meshes import with_devices

with warnings.catch_warnings():  # what others deprecate at import is not ours
    warnings.simplefilter("ignore")
    import nbformat
    from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ALLOWED = {"rlhf_jax", "jax", "numpy", "matplotlib", *sys.stdlib_module_names}


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def imported(source: str) -> set[str]:
    """Top-level packages that a cell imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def test_there_is_a_notebook():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_imports_the_library_and_what_it_stands_on(path):
    foreign = [imported(cell.source) - ALLOWED for cell in code_cells(path)]
    assert not any(foreign)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    for cell in code_cells(path):
        assert not cell.outputs
        assert cell.execution_count is None


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    notebook = read(path)
    environment = with_devices(1)
    environment["PYTHONPATH"] = str(ROOT)  # from a clone that is not installed too
    environment["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    with warnings.catch_warnings():  # of the machinery between us and the kernel
        warnings.simplefilter("ignore")
        client.execute(env=environment)  # raises at the first cell that fails
    assert all(cell.execution_count for cell in notebook.cells if "outputs" in cell)
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert pictures
    assert not list(tmp_path.iterdir())  # it cleans up after itself


def test_a_foreign_import_is_found():
    assert imported("import torch.nn\nfrom flax import linen") == {"torch", "flax"}
