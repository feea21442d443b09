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
    """The text files that `--data` names, each once; none, if no name is that of a file.

    Raises:
        ValueError: if some names are those of files and others are not.
    """
    found: set[Path] = set()
    missing = []
    for name in names:
        matches = [Path(name)] if Path(name).exists() else [*map(Path, glob.glob(name, recursive=True))]
        if not matches:
            missing.append(name)
        for path in matches:
            found.update(path.rglob("*") if path.is_dir() else [path])
    if found and missing:
        raise ValueError(f"`--data`: no file or folder has these names, or matches them: {' '.join(missing)}.")
    # As git does: a file with a zero byte near its start is no text
    return [path for path in found if path.is_file() and b"\0" not in path.open("rb").read(8000)]
