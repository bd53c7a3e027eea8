"""Import a method's script by its name."""

import importlib
from types import ModuleType

from analysis.runs import ROOT
from common.errors import UserError


def script_of(name: str) -> ModuleType:
    """Imports the script of a method: `fql` and `baselines.fql` are the same one."""
    for module in (name, f"baselines.{name}"):
        path = ROOT / f"{module.replace('.', '/')}.py"
        if path.is_file():
            script = importlib.import_module(module)
            if hasattr(script, "train_chunk"):
                return script
    raise UserError(f"there is no script {name!r}: name one, such as qam or fql")
