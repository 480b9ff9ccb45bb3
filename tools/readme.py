"""README.md from nbs/index.ipynb: its text, code, stored outputs and plots. `python tools/readme.py` writes it."""
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
FIGURES = "README_files" # Beside the README

def shown(cell):
    "A cell as the reader sees it, or `None`: directives go, and so does what is hidden."
    lines = cell.source.splitlines()
    flags = {x.removeprefix("#|").strip().replace(" ", "") for x in lines if x.startswith("#|")}
    if flags & {"hide", "default_exp"} or any(f.startswith("include:false") for f in flags): return None
    cell.source = "\n".join(x for x in lines if not x.startswith("#|"))
    if "echo:false" in flags: cell.metadata["transient"] = {"remove_source": True}
    return cell

def render(notebook=ROOT / "nbs" / "index.ipynb"):
    "The Markdown text and the figures' bytes by path; nothing is run and nothing is written."
    nb = nbformat.read(notebook, as_version=4)
    nb.cells = [c for c in map(shown, nb.cells) if c is not None and (c.source.strip() or c.get("outputs"))]
    text, parts = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True).from_notebook_node(nb, resources={"output_files_dir": FIGURES, "unique_key": "figure"})
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    note = "<!-- Written from nbs/index.ipynb by `make readme`: edit that. -->\n\n"
    return note + text, {name: data for name, data in sorted(parts["outputs"].items())}

def stale(root=ROOT):
    "Files that differ from what the notebook gives."
    text, figures = render(root / "nbs" / "index.ipynb")
    want = {"README.md": text.encode(), **figures}
    old = {str(p.relative_to(root)) for p in (root / FIGURES).glob("*")}
    return sorted({n for n, data in want.items() if not (root / n).is_file() or (root / n).read_bytes() != data} | (old - set(want)))

if __name__ == "__main__":
    text, figures = render()
    for name in stale():
        if name not in figures and name != "README.md": (ROOT / name).unlink()
    (ROOT / "README.md").write_text(text)
    for name, data in figures.items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(data)
    print("README.md is in step with nbs/index.ipynb")
