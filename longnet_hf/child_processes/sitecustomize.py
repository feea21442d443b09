"""Python runs this file as it starts in processes of a tool that `python -m longnet_hf` runs: they import the package
as soon as they have imported Transformers, and not at all if they never do."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path


_HERE = Path(__file__).parent


class _AfterTransformers:
    """A finder of modules that is asked before all others."""

    def find_spec(self, name, path=None, target=None):
        if name != "transformers":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None:  # perhaps only asked for, to see whether it is installed
            execute = spec.loader.exec_module

            def exec_module(module):
                sys.meta_path.remove(self)
                execute(module)
                from longnet_hf.__main__ import make_findable

                make_findable()

            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _AfterTransformers())
sys.path[:] = [entry for entry in sys.path if entry != str(_HERE)]
sys.path.append(str(_HERE.parents[1]))  # where the package lies, be it not installed
_hidden = importlib.machinery.PathFinder.find_spec("sitecustomize", sys.path)
if _hidden is not None:  # the file of this name that would have run
    _hidden.loader.exec_module(importlib.util.module_from_spec(_hidden))
