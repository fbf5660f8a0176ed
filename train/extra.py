"""The packages that the trainer needs beyond the library's own: the extra ``train``."""

import importlib.util
import sys

PACKAGES = ("optax", "grain", "tensorflow_datasets", "tensorboardX", "matplotlib", "sklearn")


def require_extra(module: str) -> None:
    """Ends the program with one line and exit code 2 if a package is missing; to be called before the imports.

    Args:
        module: The name after ``python -m``.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: {module} needs {', '.join(missing)}: pip install 'res2net_jax[train]'", file=sys.stderr)
        sys.exit(2)
