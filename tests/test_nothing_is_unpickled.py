"""No line of the project unpickles a file: what would is found in the source, wherever it is called from."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEVER = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "torch.jit.load", "torch.hub.load"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "numpy.lib.npyio.NpzFile"),
    *("eval", "exec", "marshal.loads", "marshal.load", "shelve.open"),
}
FOREIGN = {"dill", "cloudpickle", "joblib", "shelve", "marshal", "_pickle"}
RESTRICTED = "torch.load with weights_only=True"
ALLOWED = {
    (
        "pretrain/data/worker.py",
        "pickle.loads",
    ),  # the trainer hands its worker what to do, through their own pipe
    ("pretrain/formats/pickles.py", RESTRICTED),  # a foreign .pth, behind --trust-pickle
}


def found_in(source: str) -> set[str]:
    """The calls in `source` that can run what a file says, by their dotted names."""
    tree = ast.parse(source)
    names: dict[str, str] = {}  # as it is called here -> what it is
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update({alias.asname or alias.name: alias.name for alias in node.names})
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    found |= {name for name in names.values() if name.split(".")[0] in FOREIGN}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, _, rest = ast.unparse(node.func).partition(".")
        called = ".".join(filter(None, [names.get(first, first), rest]))
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if (
            called in NEVER
            or (called in ("numpy.load", "numpy.fromfile") and given.get("allow_pickle") != "False")
            or (called == "yaml.load" and given.get("Loader") not in ("_RecipeLoader", "yaml.SafeLoader"))
        ):
            restricted = called == "torch.load" and given.get("weights_only") == "True"
            found.add(RESTRICTED if restricted else called)
    return found


def test_the_search_finds_what_it_is_to_find() -> None:
    for line in (
        "import pickle as p; p.load(f)",
        "from pickle import loads; loads(b)",
        "import torch; torch.load('x', weights_only=True)",
        "from torch import load as get; get('x')",
        "import numpy as np; np.load('x')",
        "import numpy as np; np.load('x', allow_pickle=True)",
        "import yaml; yaml.load(t, Loader=yaml.Loader)",
        "import joblib",
        "eval(text)",
    ):
        assert found_in(line), line
    assert not found_in("import numpy as np; np.load('x', allow_pickle=False)")
    assert not found_in("model.eval(); engine.load(x)")


def test_no_file_is_unpickled_anywhere() -> None:
    sources = [
        path for folder in ("pretrain", "launch", "data_tools") for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(sources) > 100
    found = {
        (str(path.relative_to(ROOT)), call)
        for path in sources
        for call in found_in(path.read_text(encoding="utf-8"))
    }
    assert found == ALLOWED


def test_recipes_are_read_by_a_loader_that_makes_plain_data_only() -> None:
    import yaml

    from pretrain.config.load import _RecipeLoader

    assert issubclass(_RecipeLoader, yaml.SafeLoader)
