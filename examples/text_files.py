"""Which text files the examples read."""

import glob
import sysconfig
from pathlib import Path


def standard_library_files() -> list[Path]:
    """Python's own sources without tests, and without those that are mostly tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    paths = (path for path in root.rglob("*.py") if not skipped.intersection(path.relative_to(root).parts))
    return [path for path in paths if not path.name.startswith("_sysconfigdata")]


def find_files(names: list[str]) -> list[Path]:
    """The text files that `--data` names, each once."""
    found: set[Path] = set()
    for name in names:
        matches = [Path(name)] if Path(name).exists() else map(Path, glob.glob(name, recursive=True))
        for path in matches:
            found.update(path.rglob("*") if path.is_dir() else [path])
    # As git does: a file with a zero byte near its start is no text
    return [path for path in found if path.is_file() and b"\0" not in path.open("rb").read(8000)]
