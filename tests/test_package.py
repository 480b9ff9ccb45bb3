"""The package as a whole: layers, light imports, requirements, README, no traces of a machine."""
import shutil, ast, json, re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import readme

LAYERS = ("core", "config", "env", "chat", "world", "agent", "method", "domains", "policy", "engines", "rollout", "evaluation", "doctor", "demo", "matrix", "bench", "cli") # A module imports from its own layer and those before it
DOMAIN_EXTRAS = dict(tau2={"inspect-ai"}) # What a required package of a domain brings along and the domain imports
HEAVY = ("torch", "transformers", "tokenizers", "pandas", "matplotlib", "seaborn", "scipy", "numpy", "faker", "IPython")
MODULES = sorted(p for p in (ROOT / "fg_dapo").rglob("*.py") if p.name != "_modidx.py")
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)

def name_of(path):
    "Dotted name of a module file."
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

def imports(path, top=False):
    "Dotted names a module imports, anywhere in it or only at its top level."
    tree, package = ast.parse(path.read_text()), name_of(path).split(".")
    if path.name != "__init__.py": package = package[:-1]
    out = set()
    for node in (tree.body if top else ast.walk(tree)):
        if isinstance(node, ast.Import): out |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[:len(package) - node.level + 1], *([node.module] if node.module else [])]) if node.level else node.module
            out.add(base)
            out |= {f"{base}.{a.name}" for a in node.names}
    return out

def layer(dotted):
    "The layer of a dotted name of ours, or `None` for the package itself."
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "fg_dapo" else None

def wrong_way(path):
    "Imports of a module that point to a later layer."
    mine = layer(name_of(path))
    if mine is None: return []
    return sorted(n for n in imports(path) if (theirs := layer(n)) in LAYERS and LAYERS.index(theirs) > LAYERS.index(mine))

def test_every_module_has_a_layer():
    assert {layer(name_of(p)) for p in MODULES} - {None} <= set(LAYERS)

@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path):
    assert wrong_way(path) == []

def test_the_import_check_sees_relative_and_nested_imports(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    bad = tmp_path / "fg_dapo" / "world" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text("def f():\n    from ..method.feedback import x\n    import fg_dapo.cli\n")
    assert wrong_way(bad) == ["fg_dapo.cli", "fg_dapo.method.feedback", "fg_dapo.method.feedback.x"]

def loaded(*modules):
    "Heavy packages that importing some modules brings in."
    code = f"import sys\nfor m in {modules!r}: __import__(m)\nprint([h for h in {HEAVY!r} if h in sys.modules])"
    return ast.literal_eval(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout)

def test_the_command_line_imports_nothing_heavy():
    assert loaded("fg_dapo", "fg_dapo.cli", "fg_dapo.config", "fg_dapo.core", "fg_dapo.demo", "fg_dapo.doctor") == []

def test_the_world_needs_no_torch():
    light = [name_of(p) for p in MODULES if layer(name_of(p)) in ("world", "agent") or name_of(p).endswith((".diagnosis", ".feedback", ".groups", ".reward"))]
    assert len(light) > 8 and set(loaded(*light)) & {"torch", "transformers", "tokenizers"} == set()

# Requirements

DIST = dict(yaml="pyyaml", PIL="pillow", markdown_it="markdown-it-py", hydra="hydra-core", transfer_queue="transferqueue") # Import names that differ from the distribution's

def settings():
    p = ConfigParser(delimiters=["="])
    p.read(ROOT / "settings.ini")
    return p["DEFAULT"]

def required(*keys):
    "Requirements by normalised name."
    return {r.name.lower().replace("_", "-"): r for k in keys for r in map(Requirement, settings()[k].split())}

def constraints():
    lines = [x.strip() for x in (ROOT / "constraints.txt").read_text().splitlines()]
    return {n.lower().replace("_", "-"): v for n, v in (x.split("==") for x in lines if x and not x.startswith("#"))}

def third_party(path, top=False):
    "Distributions a module imports from elsewhere."
    names = {n.partition(".")[0] for n in imports(path, top)} - {"fg_dapo"} - set(sys.stdlib_module_names)
    return {DIST.get(n, n).lower().replace("_", "-") for n in names}

@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_what_is_imported_is_required(path):
    optional = {*required("verl-cpu_requirements"), "vllm"} if layer(name_of(path)) in ("engines", "bench", "cli") else set()
    domain = (name_of(path).split(".") + [""])[2] if layer(name_of(path)) == "domains" else ""
    if f"{domain}_requirements" in settings(): optional |= set(required(f"{domain}_requirements")) | DOMAIN_EXTRAS.get(domain, set())
    allowed = set(required("requirements", "local_requirements", "logging_requirements", "llm_requirements")) | optional
    assert third_party(path) <= allowed
    if layer(name_of(path)) in ("core", "config", "world", "agent", "doctor", "demo", "cli"): assert third_party(path, top=True) <= set(required("requirements"))

def test_every_direct_requirement_is_pinned_to_a_version_it_allows():
    wanted, pins = required("requirements", "local_requirements", "dev_requirements"), constraints()
    assert sorted(set(wanted) - set(pins)) == []
    assert [str(r) for n, r in wanted.items() if not r.specifier.contains(pins[n])] == []

def test_the_verl_extra_agrees_with_the_constraints():
    pins = constraints()
    assert all(r.specifier.contains(pins[n]) for n, r in required("verl-cpu_requirements").items() if n in pins)

# Notebooks and README

def cells(path): return json.loads(path.read_text())["cells"]

def source(cell): return "".join(cell["source"])

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_opens_with_what_it_gives(path):
    text = "\n".join(source(c) for c in cells(path)[:2] if c["cell_type"] == "markdown")
    assert re.match(r"# \S.*\n+> \S", text), f"{path.name}: begin with a title and one line that starts with '>'"

def test_readme_is_in_step():
    assert readme.stale(ROOT) == [], "make readme"

def test_readme_check_sees_a_changed_word(tmp_path):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "index.ipynb").write_text((ROOT / "nbs" / "index.ipynb").read_text().replace("experience", "experiences", 1))
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    shutil.copytree(ROOT / readme.FIGURES, tmp_path / readme.FIGURES)
    assert readme.stale(tmp_path) == ["README.md"]

def test_readme_names_the_commands_early_and_they_exist():
    text = (ROOT / "README.md").read_text()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert 0 < text.index("make demo") < 3000 and 0 < text.index("make test") < 3000
    named = set(re.findall(r"\bmake ((?:[a-z]+(?:-[a-z]+)* ?)+)", "\n".join(re.findall(r"`(make [^`]*)`", text))))
    assert {t for n in named for t in n.split()} <= set(targets)

def test_the_index_still_gives_its_stored_outputs(monkeypatch):
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    path = ROOT / "nbs" / "index.ipynb"
    monkeypatch.chdir(path.parent)
    def texts(nb): return ["".join("".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in c.get("outputs", [])) for c in nb.cells]
    nb, fresh = read_nb(path), read_nb(path)
    shell = CaptureShell(path)
    shell.run_all(fresh)
    assert shell.exc is None and texts(fresh) == texts(nb)

# Traces

def project_files():
    "Files that are or would be committed."
    git = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True)
    return [ROOT / f for f in git.stdout.split("\0") if f and (ROOT / f).is_file()] if git.returncode == 0 else []

MACHINE = re.compile(r"(?<![\w.])/(?:" + "|".join(("work", "root", "tmp", "home", "Users")) + r")/[\w.]")

def test_no_file_names_a_place_on_somebodys_machine():
    texts = [p for p in project_files() if p.suffix in (".py", ".ipynb", ".md", ".yaml", ".yml", ".toml", ".ini", ".txt", ".sh", ".html") or p.name in ("Makefile", "run")]
    found = [f"{p.relative_to(ROOT)}: {m.group()}" for p in texts if (m := MACHINE.search(p.read_text(errors="replace")))]
    assert found == []

def test_the_check_for_machine_paths_works():
    slash = "/"
    assert MACHINE.search(f"see {slash}tmp{slash}x.json") and MACHINE.search(f'"{slash}root{slash}.venv"') and not MACHINE.search("at work/home, docs/tmp/x")

def test_no_file_is_large():
    assert [str(p) for p in project_files() if p.stat().st_size > 8 * 2**20] == []
