"""Public names that are imported when they are first used.

Every start of pytest imports our packages, in any project that has traincert installed: that must cost nothing.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def importer(package: str, public: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's `__getattr__` (PEP 562), which finds each public name in the module that `public` gives."""

    def get(name: str) -> Any:
        if name not in public:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{public[name]}"), name)

    return get
