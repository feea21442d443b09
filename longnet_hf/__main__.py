"""`python -m longnet_hf TOOL ...`: another package's command line, where LongNets and exchanged models are known.

`trl`, `lm_eval` and `transformers` have no argument by which they would import this package, without which a LongNet
does not load, and an exchanged model may load with full attention.
"""

import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

import transformers

from .modeling_longnet import AUTO_CLASSES


def make_findable() -> None:
    """Let the classes be found by name in `transformers`, where `transformers serve` looks for them."""
    for model_class in AUTO_CLASSES.values():
        setattr(transformers, model_class.__name__, model_class)


def main(arguments: list[str]) -> None:
    """Run the console script that `arguments` begin with on the others, in this process. Processes that it starts
    import the package as well."""
    tools = {point.name: point for point in entry_points(group="console_scripts")}
    if not arguments or arguments[0] not in tools:
        sys.exit(
            "usage: python -m longnet_hf TOOL [ARGUMENTS OF THE TOOL]\n\nruns a console script that is installed, "
            "such as trl or transformers, where LongNets are known"
            + (f"; there is none by the name of {arguments[0]!r}" if arguments else "")
        )
    make_findable()
    search = str(Path(__file__).parent / "child_processes"), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, search))
    sys.argv = list(arguments)
    sys.exit(tools[arguments[0]].load()())


if __name__ == "__main__":
    main(sys.argv[1:])
