"""The architecture, held by tests: who may import whom, and that scripts and files stay readable."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "diffusers_wadi"

# Part -> parts of the package that it may import. A part is a subpackage or a module of the package.
ALLOWED = {
    "lorad": set(),
    "schedulers": set(),
    "_optional": set(),
    "_files": set(),
    "_images": {"_files"},
    "_on_import": set(),
    "_adapter_files": {"lorad", "_files"},
    "shapes": {"_optional"},
    "authors_files": {"_files"},
    "_adapter_ops": {"lorad"},
    "_offloading": {"lorad"},
    "_adapter_io": {"lorad", "_adapter_files", "_adapter_ops", "_files", "_offloading"},
    "model_card": {"lorad", "_adapter_files", "_files"},
    "_hub": {"model_card", "_files"},
    "loaders": {
        "lorad",
        "model_card",
        "_adapter_files",
        "_adapter_io",
        "_adapter_ops",
        "_hub",
        "_files",
        "_offloading",
    },
    "pipelines": {
        "lorad",
        "loaders",
        "schedulers",
        "model_card",
        "_adapter_files",
        "_adapter_ops",
        "_files",
        "_hub",
        "_offloading",
        "authors_files",
        "downstream",  # ScaleCrafter alone, at use: see test_pipelines_reach_up_only_at_use
    },
    "distillation": {
        "lorad",
        "loaders",
        "pipelines",
        "schedulers",
        "shapes",
        "model_card",
        "_adapter_files",
        "_adapter_ops",
        "_files",
        "_hub",
        "_optional",
    },
    "conversion": {"lorad", "loaders", "pipelines", "_adapter_files", "_files"},
    "downstream": {"lorad", "loaders", "pipelines", "schedulers", "_files", "_optional"},
    "customization": {
        "lorad",
        "loaders",
        "downstream",
        "distillation",
        "model_card",
        "_adapter_files",
        "_adapter_ops",
        "_files",
        "_hub",
    },
    "analysis": {"lorad", "conversion", "authors_files", "_adapter_files", "_files", "_optional"},
    "serving": set(),
    "evaluation": {"pipelines", "loaders", "schedulers", "shapes", "authors_files", "serving", "_files", "_optional"},
    "demo": {
        "serving",
        "pipelines",
        "downstream",
        "analysis",
        "shapes",
        "loaders",
        "schedulers",
        "_files",
        "_images",
        "_optional",
    },
    "cli": {
        "pipelines",
        "conversion",
        "analysis",
        "evaluation",
        "shapes",
        "loaders",
        "schedulers",
        "demo",
        "_images",
        "_files",
        "_optional",
    },
}
OPTIONAL = {
    "scipy",
    "matplotlib",
    "gradio",
    "spaces",
    "controlnet_aux",
    "datasets",
    "pyarrow",
    "torch_fidelity",
    "open_clip",
    "bitsandbytes",
}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(absolute module name, whether at the top level of the module) of every import in a file."""
    package = ["diffusers_wadi", *path.relative_to(PACKAGE).parts[:-1]]
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in tree.body) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            found.append((module, node in tree.body))
            if module == "diffusers_wadi":
                found += [(f"{module}.{alias.name}", node in tree.body) for alias in node.names]
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.name != "__init__.py"]


@pytest.mark.parametrize("path", [p for p in SOURCES if part_of(p) == "downstream"], ids=lambda path: path.name)
def test_downstream_tasks_do_not_know_one_another(path):
    task = path.relative_to(PACKAGE / "downstream").parts[0].removesuffix(".py")
    used = {name for name, _ in imports(path) if name.startswith("diffusers_wadi.downstream.")}
    assert all(name.split(".")[2] == task for name in used), used


def test_pipelines_reach_up_only_at_use():
    """`pipe.enable_scalecrafter` is a method for those who look for it there; what it calls knows no pipeline."""
    for path in [p for p in SOURCES if part_of(p) == "pipelines"]:
        up = [(name, top) for name, top in imports(path) if name.startswith("diffusers_wadi.downstream")]
        assert all(name == "diffusers_wadi.downstream.scalecrafter" and not top for name, top in up), (path.name, up)
    for path in (PACKAGE / "downstream" / "scalecrafter").glob("*.py"):
        used = {name for name, _ in imports(path) if name.startswith("diffusers_wadi.")}
        assert all(name.startswith(("diffusers_wadi.lorad", "diffusers_wadi.downstream.")) for name in used), used


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_parts_import_only_the_parts_below_them(path):
    part = part_of(path)
    assert part in ALLOWED, f"{part} is not in the table of parts: add it with what it may import"
    used = {name.split(".")[1] for name, _ in imports(path) if name.startswith("diffusers_wadi.")}
    assert used <= ALLOWED[part] | {part}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_packages_are_imported_at_use(path):
    assert not {name.split(".")[0] for name, top in imports(path) if top} & OPTIONAL


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            limit = 130 if node.name == "__call__" else 60
            assert node.end_lineno - node.lineno < limit, f"{path.name}: {node.name} is too long"


def test_loaded_files_are_data():
    """No pickle that could run code, no remote code on our own initiative."""
    for path in [*SOURCES, *(ROOT / "training").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("weights_only") == "True", f"{path.name}:{node.lineno}"
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert not (isinstance(node.value, ast.Constant) and node.value.value), f"{path.name}:{node.lineno}"
