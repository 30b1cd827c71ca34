"""The rules that keep chapters, modules and rungs in step (design: one technique = one chapter = one module)."""

import ast
import json
import re
from pathlib import Path

import pytest

from speedrun_lib.recipe import LADDER, SIZES, choice_fields, recipe_for

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("[!_]*.ipynb"))
STYLE_MODULES = {"page"}  # drawing helpers that import nothing of the package: every chapter may use them


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def exported_modules() -> dict[str, str]:
    "Module name -> notebook that exports it."
    found = {}
    for path in NOTEBOOKS:
        for cell in load(path)["cells"]:
            match = re.search(r"^#\|\s*default_exp\s+(\w+)", "".join(cell["source"]), re.M)
            if match:
                assert match[1] not in found, f"{match[1]} is exported by two notebooks"
                found[match[1]] = path.stem
    return found


MODULES = exported_modules()


def test_every_module_has_a_notebook():
    files = {p.stem for p in (ROOT / "speedrun_lib").glob("*.py")} - {"__init__", "_modidx"}
    assert files == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_chapters_import_only_lower_chapters(module):
    tree = ast.parse((ROOT / f"speedrun_lib/{module}.py").read_text(encoding="utf-8"))
    used = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}
    chapter = int(MODULES[module][:2])
    for other in used - STYLE_MODULES:
        number = int(MODULES[other][:2])
        # workshop modules (90 and up) build on all chapters and on each other, without cycles (import would fail)
        assert number < chapter or chapter >= 90, f"{module} (chapter {chapter}) imports {other} (chapter {number})"
    if module in STYLE_MODULES:
        assert not used, f"{module} is used everywhere and must not import the package"


@pytest.mark.parametrize("module", MODULES)
def test_gradients_are_in_autograd_functions(module):
    "The compiler's cache on disk does not notice when a formula changes that was registered with an operator."
    tree = ast.parse((ROOT / f"speedrun_lib/{module}.py").read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "register_autograd"]


def test_no_exported_name_is_defined_twice():
    owners: dict[str, str] = {}
    for module in MODULES:
        tree = ast.parse((ROOT / f"speedrun_lib/{module}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else [
                t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
            for name in names:
                if not name.startswith("__"):
                    assert name not in owners, f"{name} is defined in {owners.get(name)} and {module}"
                    owners[name] = module


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_saved_notebooks_are_clean(path):
    assert path.stat().st_size <= 200 * 1024
    for cell in load(path)["cells"]:
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error" and output.get("name") != "stderr", cell["source"]
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {}), cell["source"]


@pytest.mark.parametrize("rung", LADDER, ids=lambda r: r.name)
def test_every_rung_has_a_chapter_and_a_change(rung):
    assert (ROOT / f"nbs/{rung.chapter}.ipynb").exists()
    if rung is not LADDER[0]:
        fields = choice_fields()
        assert any(name in fields for name in rung.changes), "a rung switches at least one technique"
    for size in SIZES:
        recipe = recipe_for(rung.name, size)
        assert recipe.batch_rows % 8 == 0 and 0 <= recipe.warmup_frac + recipe.cooldown_frac <= 1


def test_every_link_between_pages_leads_somewhere():
    names = {p.name for p in NOTEBOOKS}
    for path in NOTEBOOKS:
        text = "".join("".join(c["source"]) for c in load(path)["cells"] if c["cell_type"] == "markdown")
        for link in re.findall(r"\]\(([\w.]+\.ipynb)", text):
            assert link in names, f"{path.name} links to {link}"


def test_every_asset_has_its_provenance():
    table = (ROOT / "speedrun_lib/assets/README.md").read_text(encoding="utf-8")
    for file in (ROOT / "speedrun_lib/assets").rglob("*.*"):
        name = file.relative_to(ROOT / "speedrun_lib/assets").as_posix()
        assert name == "README.md" or name in table or f"{Path(name).parent}/*{file.suffix}" in table, name


def test_top_level_is_what_the_owner_asked_for():
    wanted = {"nbs", "speedrun_lib", "exported_scripts", "tests", "settings.ini", "setup.py", "README.md",
              "LICENSE", "CONTRIBUTING.md"}
    made_here = {"data", "runs", "build", "_site", "_proc"}  # ignored by git
    present = {p.name for p in ROOT.iterdir() if not p.name.startswith(".") and not p.name.endswith(".egg-info")}
    assert wanted <= present <= wanted | made_here
