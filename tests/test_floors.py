"""The house: imports go down only, and the lower floors need torch and einops alone."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "zolr"

FLOORS: dict[str, int] = {
    name: floor
    for floor, names in enumerate(
        (
            ("errors", "keys"),
            (
                "subspaces",
                "probes",
                "spectra",
                "factored",
                "beside",
                "factorizations",
                "held",
                "fakes",
                "merged",
                "modes",
                "distributed",
                "norms",
                "rows",
                "aside",
                "undo",
            ),
            (
                "variables",
                "attaching",
                "projectors",
                "estimators",
                "transports",
                "residuals",
                "layers",
                "optim",
            ),
            (
                "methods",
                "kinds",
                "tuning",
                "dense",
                "windows",
                "reads",
                "verify",
                "compiled",
                "refusals",
                "engine",
            ),
            (
                "hub",
                "tasks",
                "models",
                "lora",
                "memory",
                "checkpoints",
                "journal",
                "training",
                "adapters",
                "diagnostics",
                "sharded",
            ),
            ("cli",),
        )
    )
    for name in names
}
TOP = 6  # __main__
FREE = {"__init__"}  # the public names, nothing else
# on floor 2 parts meet in the engine; only these may look at each other
ALLOWED_ON_FLOOR_2 = {("estimators", "variables"), ("attaching", "variables")}
FLOORS_WITH_NEIGHBORS = {1, 3, 4, 5}
OUTSIDE = {"torch", "einops"}
HIGHEST_FLOOR_WITHOUT_OTHER_PACKAGES = 3
FORBIDDEN_NAMES = {"utils", "helpers", "base", "types", "core"}


def modules(package: Path) -> dict[str, Path]:
    """Dotted name below `zolr` of every file: `keys`, `projectors`, `projectors.stiefel`, ..."""
    result = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        result[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return result


def floor_of(name: str) -> int | None:
    """Floor of a module by its first name; None for one that stands on no floor."""
    part = name.split(".")[0]
    return TOP if part == "__main__" else FLOORS.get(part)


def imports(name: str, path: Path, known: set[str]) -> list[tuple[int, str]]:
    """`(line, dotted name)` of everything a file imports, wherever in the file; own modules without `zolr.`.

    An own module is given as `zolr:NAME`.
    """
    found: list[tuple[int, str]] = []
    here = ["zolr", *name.split(".")]
    if path.name != "__init__.py":
        here = here[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, own(alias.name, known)) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (package, node.module)))
            # `from zolr import keys` and `from zolr.projectors import stiefel` may name modules
            found += [(node.lineno, own(f"{base}.{alias.name}", known)) for alias in node.names]
    return found


def own(dotted: str, known: set[str]) -> str:
    """`zolr:NAME` of the module that a dotted name lies in, or the name itself for one of another package."""
    parts = dotted.split(".")
    if parts[0] != "zolr":
        return dotted
    for length in range(len(parts), 1, -1):
        if ".".join(parts[1:length]) in known:
            return "zolr:" + ".".join(parts[1:length])
    return "zolr:__init__"


def complaints(package: Path) -> list[str]:
    """All breaches of the rules of the house, each with what is allowed instead."""
    files = modules(package)
    result = []
    for name, path in files.items():
        if path.stem in FORBIDDEN_NAMES or path.parent.name in FORBIDDEN_NAMES:
            result.append(f"{name}: '{path.stem}' says nothing; name the file by what it holds")
        if name in FREE:
            continue
        floor = floor_of(name)
        if floor is None:
            result.append(f"{name}: stands on no floor; give it one in FLOORS and in the design")
            continue
        for line, target in imports(name, path, set(files)):
            where = f"{name}:{line} imports {target}"
            if target.startswith("zolr:"):
                result += [f"{where}: {why}" for why in inside(name, floor, target.removeprefix("zolr:"))]
            elif floor <= HIGHEST_FLOOR_WITHOUT_OTHER_PACKAGES:
                root = target.split(".")[0]
                if root not in OUTSIDE and root not in sys.stdlib_module_names:
                    result.append(f"{where}: floors 0 to 3 need torch, einops and the standard library alone")
    return result


def inside(name: str, floor: int, target: str) -> list[str]:
    """What is wrong with one import between own modules."""
    if target == "__init__":
        # higher floors ask it for the version
        return [] if floor >= 4 else ["the public names are for users; import the module itself"]
    below = floor_of(target)
    part, other = name.split(".")[0], target.split(".")[0]
    if below is None:
        return ["it stands on no floor"]
    if below > floor:
        return [f"floor {floor} imports floor {below}; imports go down"]
    if below < floor:
        return []
    if part == other:
        # a folder's own files: the registry in __init__ names them, they see the protocol in __init__
        is_registry, to_registry = name == part, target == other
        if floor == 2 and not is_registry and not to_registry:
            return [
                f"files of one part see only the part's __init__; move what both need into zolr/{part}/__init__.py"
            ]
        return []
    if floor in FLOORS_WITH_NEIGHBORS or (floor == 2 and (part, other) in ALLOWED_ON_FLOOR_2):
        return []
    return [f"neighbors on floor {floor} do not see each other; they meet one floor up"]


def test_imports_go_down_only() -> None:
    assert not complaints(PACKAGE), "\n".join(complaints(PACKAGE))


def test_every_floor_is_inhabited() -> None:
    found = {floor_of(name) for name in modules(PACKAGE)} - {None}
    assert found >= {0, 1, 2, 3, 4, 5}
    assert (PACKAGE / "projectors" / "__init__.py").exists() and len(modules(PACKAGE)) > 20


BREACHES = {
    "up": ("keys.py", "from zolr.engine import Engine", "imports go down"),
    "up inside a function": ("subspaces.py", "def f():\n    import zolr.variables", "imports go down"),
    "neighbor on floor 0": ("errors.py", "from zolr.keys import Key", "do not see each other"),
    "neighbor on floor 2": (
        "projectors/a.py",
        "from zolr.transports import Transport",
        "do not see each other",
    ),
    "variables from a projector": (
        "projectors/a.py",
        "from zolr.variables import Variable",
        "do not see each other",
    ),
    "estimators from a projector": (
        "projectors/a.py",
        "from zolr import estimators",
        "do not see each other",
    ),
    "optim from transports": ("transports/a.py", "from ..optim import OPTIMIZERS", "do not see each other"),
    "projectors from variables": ("variables.py", "import zolr.projectors", "do not see each other"),
    "a sibling file": ("projectors/a.py", "from zolr.projectors.b import B", "only the part's __init__"),
    "a sibling file, relative": ("projectors/a.py", "from .b import B", "only the part's __init__"),
    "another package": ("engine.py", "import numpy as np", "torch, einops and the standard library"),
    "another package, late": ("variables.py", "def f():\n    from transformers.x import y", "torch, einops"),
    "public names": ("engine.py", "import zolr", "public names are for users"),
    "a file without a floor": ("ledger.py", "", "stands on no floor"),
    "a folder without a floor": ("kernels/a.py", "", "stands on no floor"),
    "a name that says nothing": ("tasks/utils.py", "", "says nothing"),
    "a folder that says nothing": ("core/a.py", "", "says nothing"),
}


def house(root: Path, file: str, text: str) -> Path:
    package = root / "zolr"
    for name in ("__init__", "keys", "errors", "variables", "engine", "subspaces", "projectors/__init__"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text("import torch\n")
    for name in ("projectors/b", "transports/__init__", "optim/__init__", "estimators/__init__"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text("import math\n")
    (package / file).parent.mkdir(parents=True, exist_ok=True)
    (package / file).write_text(text)
    return package


@pytest.mark.parametrize("case", BREACHES)
def test_a_breach_is_seen(case: str, tmp_path: Path) -> None:
    file, text, why = BREACHES[case]
    assert any(why in complaint for complaint in complaints(house(tmp_path, file, text)))


ALLOWED = {
    "down": ("engine.py", "from zolr.variables import Variable\nfrom zolr.projectors.b import B"),
    "variables from an estimator": ("estimators/a.py", "from zolr.variables import attach"),
    "the protocol": ("projectors/a.py", "from zolr.projectors import Side\nfrom zolr.keys import Key"),
    "the registry": ("projectors/__init__.py", "from zolr.projectors.b import B"),
    "a neighbor on floor 1": ("subspaces.py", "from zolr.probes import row_blocks"),
    "einops": ("variables.py", "from einops import rearrange\nimport torch.nn.functional as F"),
    "anything above": ("models.py", "import transformers\nfrom zolr import engine"),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_what_is_allowed_is_not_complained_of(case: str, tmp_path: Path) -> None:
    file, text = ALLOWED[case]
    package = house(tmp_path, file, text)
    (package / "probes.py").write_text("")
    assert complaints(package) == []
