"""Quantization-aware training for Ascend hardware in PyTorch Lightning: one callback, AMCT's formats and numbers."""

# Importing the package alone loads neither torch nor Lightning, which take seconds; the command needs them rarely.

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amct_lightning.public import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        """Load what is asked for: a module of the package, or all public names."""
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        if find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")
        public = import_module(f"{__name__}.public")
        globals().update({known: getattr(public, known) for known in public.__all__}, __all__=public.__all__)
        if name not in globals():
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        return globals()[name]

    def __dir__() -> list[str]:
        """Return the public names as well, loaded or not."""
        return sorted({*globals(), *__getattr__("__all__")})


class _Registration:
    """Makes the accelerators and strategies of this package known to Lightning the moment that Lightning is there."""

    _is_looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Let the others find Lightning, and register after it has been loaded; see ``importlib``."""
        if fullname != "lightning" or self._is_looking:
            return None
        self._is_looking = True
        try:
            spec = find_spec(fullname)
        finally:
            self._is_looking = False
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return spec
        load = loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            del loader.exec_module
            load(module)
            sys.meta_path.remove(self)
            import_module(f"{__name__}.ascend")

        loader.exec_module = load_and_register  # of this one object, which loads Lightning and nothing else
        return spec


if "lightning" in sys.modules:
    import_module(f"{__name__}.ascend")
else:
    sys.meta_path.insert(0, _Registration())
