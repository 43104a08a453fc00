"""Imports point one way, form no circle, and load heavy libraries only where a table allows.

`tests.import_reader` finds the imports, those inside functions and strings too. The order of
packages is the one of docs/architecture.md. To see a test fail, turn any import of the tree round.
"""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests import REPOSITORY
from tests.import_reader import (
    HEAVY,
    OUTER,
    TOPS,
    face,
    imports,
    imports_in,
    modules,
    package,
)

LEVELS: tuple[tuple[str, ...], ...] = (
    ("common",),
    ("architecture", "metrics"),
    ("config",),
    ("recipes", "data", "model", "serving"),
    ("checkpoint",),
    ("planning", "faults", "upstream", "rlvr"),
    ("cpu", "evaluation", "muon"),
    ("conversion",),
    ("rollouts",),
    ("training",),
    ("launchers",),
    ("ablations", "gpu_check"),
    ("cli",),
)
"""The order of packages. A package imports from earlier lines only, not from its own."""

ROOMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "data": (
        ("corpus",),
        ("tokens",),
        ("chat",),
        ("phase_record",),
        ("prepared_folder",),
        ("prepare", "feed", "pipeline"),
        ("packs_input",),
        ("prepare_packs", "verify"),
    ),
    "conversion": (
        ("rows",),
        ("latent_rows",),
        ("mapping",),
        ("huggingface", "torch_dist"),
        ("jobs", "exportable"),
        ("convert", "live_weights"),
        ("verification", "bridge"),
        ("release",),
    ),
    "ablations": (
        ("asking",),
        ("running",),
        ("answering",),
        # The studies, a file each.
        (
            "active_experts",
            "balance_coefficient",
            "balance_gradient",
            "balancing",
            "capacity",
            "depth_width",
            "document_masking",
            "fim_level",
            "fim_rate",
            "fp8",
            "gate_up",
            "interleaving",
            "kv_heads",
            "long_context",
            "mla",
            "mtp",
            "mtp_depth",
            "optimizer",
            "packing",
            "piece_order",
            "shared_expert",
            "window",
            "window_period",
        ),
    ),
}
"""The order inside the packages that have folders of their own, read the same way."""

AT_IMPORT: dict[str, tuple[str, ...]] = {
    "mellum2_megatron.data.feed.indexed_documents": ("torch", "megatron"),
    "mellum2_megatron.data.feed": ("torch",),
    "mellum2_megatron.checkpoint.safe_metadata": ("torch",),
    "mellum2_megatron.model": ("torch", "megatron"),
    "mellum2_megatron.faults.step_guard": ("torch",),
    "mellum2_megatron.training.datasets": ("torch",),
    "mellum2_megatron.training.hooks": ("megatron",),
    "mellum2_megatron.training.loop": ("torch", "megatron"),
    "mellum2_megatron.training.metrics": ("torch", "megatron"),
    "mellum2_megatron.training.decoding": ("torch", "megatron"),
    "mellum2_megatron.training.samples": ("torch", "megatron"),
    "mellum2_megatron.training.tasks": ("torch", "megatron"),
    "mellum2_megatron.training.validation_documents": ("torch", "megatron"),
    "mellum2_megatron.training.step": ("torch", "megatron"),
    "mellum2_megatron.rlvr.objective": ("torch",),
    "mellum2_megatron.rollouts": ("torch",),
    "mellum2_megatron.training.rollouts": ("torch", "megatron"),
    "mellum2_megatron.cpu": ("torch",),
    "mellum2_megatron.muon.even_shares": ("torch", "megatron"),
    "conversion.bridge": ("torch", "megatron"),
    "conversion": ("torch",),
}
"""Modules that may load a heavy library at import; all others do so inside functions."""

OLD_PATHS = {
    "mellum2_megatron.megatron_fields": "mellum2_megatron.architecture.megatron_fields",
    "mellum2_megatron.scoring": "mellum2_megatron.model.scoring",
    "mellum2_megatron.stages": "mellum2_megatron.planning.stage_chain",
    "conversion.fallback_config": "conversion.huggingface.fallback_config",
    "conversion.bridge_model": "conversion.bridge.model",
}
"""Modules kept under a former path; each only imports from its new place."""

LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


# -- The rules -------------------------------------------------------------------------------------


def room(module: str) -> tuple[int, str] | None:
    """Return a module's place in `ROOMS`: its level there, and the room's name."""
    inner = module.removeprefix(face(module)).strip(".").partition(".")[0]
    for level, names in enumerate(ROOMS.get(package(module), ())):
        if inner in names:
            return level, inner
    return None


def wrong_way(source: str, target: str) -> str | None:
    """Return why `source` must not import `target`; None if it may."""
    if source in OLD_PATHS or source == "mellum2_megatron.__main__":
        allowed = OLD_PATHS.get(source, "mellum2_megatron.cli")
        return None if target == allowed else f"an old path imports {allowed} and nothing else"
    if target in OLD_PATHS:
        return f"an old path; the module is {OLD_PATHS[target]}"
    if target == "mellum2_megatron":
        return None
    importing, imported = package(source), package(target)
    if importing == imported:
        if target == face(source):
            return "a module does not import its own package's face"
        mine, other = room(source), room(target)
        if mine and other and mine[1] != other[1] and other[0] >= mine[0]:
            return f"{mine[1]} may import only rooms before it; {other[1]} is not"
        return None
    for name in (importing, imported):
        if name not in LEVEL:
            return f"{name or 'mellum2_megatron'} stands nowhere in the order of packages"
    # The engines of rollouts hold the model in Hugging Face's form.
    allowed = (*OUTER, "cli", *(("rollouts",) if imported == "conversion" else ()))
    if imported in OUTER and importing not in allowed:
        return "inside mellum2_megatron only cli imports conversion, launchers or ablations"
    if LEVEL[imported] >= LEVEL[importing]:
        return f"{importing} may import only packages before it; {imported} is not"
    return None


def arrows() -> list[tuple[str, str]]:
    """Imports between our own modules, each pair once, in order."""
    return sorted(
        {(entry.source, entry.target) for entry in imports() if entry.target in modules()}
    )


def circles(pairs: list[tuple[str, str]]) -> list[list[str]]:
    """Return groups of modules that import each other: Tarjan's strongly connected components."""
    after: dict[str, list[str]] = {}
    for source, target in pairs:
        after.setdefault(source, []).append(target)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for successor in after.get(node, ()):
            if successor not in index:
                visit(successor)
                low[node] = min(low[node], low[successor])
            elif successor in stack:
                low[node] = min(low[node], index[successor])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for node in sorted(after):
        if node not in index:
            visit(node)
    return groups


# -- Order and circles -----------------------------------------------------------------------------


def test_every_package_has_its_place() -> None:
    inner = {package(module) for module in modules() if module not in OLD_PATHS and "." in module}
    assert inner - {"__main__"} | {*OUTER} == set(LEVEL)


def test_every_package_is_read() -> None:
    code = {file.parent.name for file in REPOSITORY.glob("*/*.py")}
    assert code - {"tests", "benchmarks"} == set(TOPS)


@pytest.mark.parametrize("name", ROOMS)
def test_every_room_has_its_place(name: str) -> None:
    inside = [module for module in modules() if package(module) == name and module != face(module)]
    assert [module for module in inside if module not in OLD_PATHS and room(module) is None] == []
    rooms = {place[1] for module in inside if (place := room(module))}
    assert rooms == {room for rooms in ROOMS[name] for room in rooms}


def test_every_imported_module_exists() -> None:
    ours = [entry for entry in imports() if entry.target.partition(".")[0] in TOPS]
    assert [entry for entry in ours if entry.target not in modules()] == []


def test_imports_point_one_way() -> None:
    wrong = [
        f"{modules()[entry.source].relative_to(REPOSITORY)}:{entry.line}: {entry.target}: {why}"
        for entry in imports()
        if entry.target in modules() and (why := wrong_way(entry.source, entry.target))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circles_between_modules() -> None:
    assert circles(arrows()) == []


def test_public_names_come_from_the_face_of_another_package() -> None:
    public: dict[str, set[str]] = {}
    for module, file in modules().items():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                public[module] = set(ast.literal_eval(node.value))
    assert {"mellum2_megatron.architecture", "mellum2_megatron.config"} <= set(public)
    deep = [
        f"{entry.source}:{entry.line}: take {name} from {face(entry.target)}"
        for entry in imports()
        if package(entry.source) != package(entry.target)
        if entry.source not in OLD_PATHS and entry.target != face(entry.target)
        for name in entry.names
        if name in public.get(face(entry.target), ())
    ]
    assert not deep, "\n".join(deep)


def test_no_private_name_crosses_modules() -> None:
    ours = [entry for entry in imports() if entry.target in modules()]
    private = [entry for entry in ours if any(name.startswith("_") for name in entry.names)]
    assert [entry for entry in private if entry.names != ("__version__",)] == []


def test_any_reversed_import_is_found() -> None:
    pairs = arrows()
    turned = [(target, source) for source, target in pairs if source not in OLD_PATHS]
    assert sum(package(source) != package(target) for source, target in turned) > 100
    assert [
        f"{source} -> {target}"
        for source, target in turned
        if wrong_way(source, target) is None and not circles([*pairs, (source, target)])
    ] == []


WAYS_TO_IMPORT = {
    "plain": "import mellum2_megatron.cli",
    "as": "import mellum2_megatron.cli.app as app",
    "from_top": "from mellum2_megatron import cli",
    "from_face": "from mellum2_megatron.cli import main",
    "star": "from mellum2_megatron.cli.app import *",
    "function": "def f():\n    from mellum2_megatron.cli import main",
    "class": "class A:\n    import mellum2_megatron.cli",
    "try": "try:\n    import mellum2_megatron.cli\nexcept ImportError:\n    pass",
    "type_checking": "if TYPE_CHECKING:\n    from mellum2_megatron.cli import main",
    "import_module": "import_module('mellum2_megatron.cli')",
    "keyword": "importlib.import_module(name='mellum2_megatron.cli')",
    "dunder": "f = lambda: __import__('mellum2_megatron.cli.app')",
    "runpy": "runpy.run_module('mellum2_megatron.cli.app')",
    "entry_point": "load('mellum2_megatron.cli:main')",
    "list_of_words": "command = [python, '-m', 'mellum2_megatron.cli']",
    "shell": "os.system('python -m mellum2_megatron.cli info')",
}


@pytest.mark.parametrize("way", WAYS_TO_IMPORT)
def test_every_way_to_import_is_read(way: str) -> None:
    source = "mellum2_megatron.config.run"
    targets = [entry.target for entry in imports_in(source, WAYS_TO_IMPORT[way])]
    assert [target for target in targets if wrong_way(source, target)], targets


@pytest.mark.parametrize(
    "text", ["from . import cli", "from .run import Run"], ids=["package", "module"]
)
def test_relative_imports_are_refused(text: str) -> None:
    with pytest.raises(AssertionError, match="relative import"):
        list(imports_in("mellum2_megatron.config.run", text))


def test_computed_names_are_refused() -> None:
    with pytest.raises(AssertionError, match="computed name"):
        list(imports_in("mellum2_megatron.config.run", "import_module(package + '.cli')"))


# -- Heavy libraries -------------------------------------------------------------------------------


def row(module: str) -> str | None:
    """Return the first name of `AT_IMPORT` that covers `module`."""
    return next((name for name in AT_IMPORT if f"{module}.".startswith(f"{name}.")), None)


def test_heavy_libraries_load_only_where_the_table_says() -> None:
    direct: dict[str, set[str]] = {}
    for entry in imports():
        if entry.eager:
            direct.setdefault(entry.source, set()).add(entry.target)

    def loads(module: str) -> set[str]:
        seen, waiting, heavy = set[str](), [module], set[str]()
        while waiting:
            name = waiting.pop()
            seen.add(name)
            # Importing a.b.c runs a/__init__ and a/b/__init__ first.
            parts = name.split(".")
            faces = {".".join(parts[:end]) for end in range(1, len(parts))}
            targets = direct.get(name, set()) | faces
            heavy |= {target.partition(".")[0] for target in targets} & set(HEAVY)
            waiting += [target for target in targets if target in modules() and target not in seen]
        return heavy

    loaded: dict[str | None, dict[str, set[str]]] = {}
    for module in modules():
        if module not in OLD_PATHS and (heavy := loads(module)):
            loaded.setdefault(row(module), {})[module] = heavy
    assert loaded.pop(None, {}) == {}
    by_row = {name: set().union(*heavy.values()) for name, heavy in loaded.items()}
    assert by_row == {name: set(libraries) for name, libraries in AT_IMPORT.items()}


EAGER = {
    "as": "import torch.nn.functional as F",
    "class": "class A:\n    import torch",
    "try": "try:\n    from torch import nn\nexcept ImportError:\n    pass",
    "not_type_checking": "if not TYPE_CHECKING:\n    import torch",
    "else_of_type_checking": "if TYPE_CHECKING:\n    pass\nelse:\n    import torch",
    "default_value": "def f(a=__import__('torch')): ...",
    "decorator": "@import_module('torch').no_grad()\ndef f(): ...",
}
LAZY = {
    "function": "def f():\n    import torch",
    "async_function": "async def f():\n    if x:\n        import torch",
    "lambda": "f = lambda: __import__('torch')",
    "type_checking": "if TYPE_CHECKING:\n    import torch",
    "typing": "if typing.TYPE_CHECKING:\n    import torch",
}


@pytest.mark.parametrize("way", [*EAGER, *LAZY])
def test_eager_and_lazy_imports_are_distinguished(way: str) -> None:
    entries = list(imports_in("mellum2_megatron.config.run", (EAGER | LAZY)[way]))
    assert [entry.target.partition(".")[0] for entry in entries] == ["torch"]
    assert entries[0].eager == (way in EAGER)


def test_the_cpu_backend_is_imported_in_functions_only() -> None:
    """A process that trains on GPUs never loads it."""
    entries = [entry for entry in imports() if package(entry.target) == "cpu"]
    assert any(package(entry.source) != "cpu" for entry in entries)
    assert [entry for entry in entries if entry.eager and package(entry.source) != "cpu"] == []


@pytest.mark.parametrize("allowed", [(), ("torch",)], ids=["none", "torch"])
def test_no_other_heavy_library_is_really_loaded(allowed: tuple[str, ...]) -> None:
    """Python's own answer: it sees what third packages load, and functions called at import."""
    names = [
        name
        for name, place in ((name, row(name)) for name in modules())
        if (AT_IMPORT[place] if place else ()) == allowed
        # NeMo-Run is an extra, and loads torch; ``__main__`` starts the command line.
        if name not in OLD_PATHS
        and not name.startswith("launchers.nemo")
        and not name.endswith("__main__")
    ]
    code = f"import sys\nimport {', '.join(names)}\nprint(*({set(HEAVY)!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) <= set(allowed)


# -- Old paths -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), OLD_PATHS.items())
def test_old_paths_still_work(old: str, new: str) -> None:
    tree = ast.parse(modules()[old].read_text(encoding="utf-8"))
    names = [
        alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert names
    definitions = ast.parse(modules()[new].read_text(encoding="utf-8")).body
    defined = {
        node.name for node in definitions if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert set(names) <= defined
