"""Execute the notebooks in place, so that what they show comes from a command."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path) -> None:
    """Execute a notebook and write it back, without times, widgets or versions.

    Parameters
    ----------
    path : Path
        The notebook.
    """
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(
        notebook, resources=resources, record_timing=False, coalesce_streams=True
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
    notebook.metadata.clear()
    notebook.metadata.update(METADATA)
    nbformat.write(notebook, path)


def _is_progress(output: nbformat.NotebookNode) -> bool:
    """Tell whether an output is a progress bar, or the nothing that is left of it."""
    data = output.get("data", {})
    widget = "application/vnd.jupyter.widget-view+json" in data
    return widget or (bool(data) and not data.get("text/plain", "x").strip())


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(Path(__file__).parent.glob("*.ipynb")):
        print(name, flush=True)
        execute(Path(name))
