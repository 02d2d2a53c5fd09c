"""Imports of large libraries in less time: without what they import beside what is used here.

`import lightning` imports torchmetrics for two classes, which imports all its metrics, and torchvision, transformers
and scipy.signal for those; diffusers does alike. Here such a package's own file is run when somebody asks the package
for more.
"""

import atexit
import gc
import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress


@contextmanager
def quick_imports() -> Iterator[None]:
    """Around a command's imports of torch, Lightning and metrics.

    The garbage collector rests, which would go through all that they make again and again, and spares it afterwards,
    too: what exists at the end stays.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        logger = logging.getLogger("torchmetrics")
        names = {"__version__": "__about__", "_logger": logger, "Metric": "metric", "MetricCollection": "collections"}
        lazily("torchmetrics", names)
        lazily("torchmetrics.image", {})
        importlib.import_module("torchmetrics.utilities")  # without which torchmetrics.metric cannot be imported
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # nanobind complains of what is left at the very end
        if enabled:
            gc.enable()


def lazily(package: str, names: Mapping[str, object]) -> None:
    """Puts the package in sys.modules without running its file; not if it is there already.

    `names` says what its attributes are or, as a word, in which module below it they are. Who asks for any other runs
    the package's file, in the same module object; modules below the package are imported as ever.
    """
    if package in sys.modules or (spec := importlib.util.find_spec(package)) is None or spec.loader is None:
        return
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    sys.modules[package] = module
    parent, _, name = package.rpartition(".")
    if parent:
        setattr(sys.modules[parent], name, module)

    def attribute(name: str) -> object:
        home = names.get(name)
        if isinstance(home, str):
            with suppress(ImportError, AttributeError):  # of a version that has it elsewhere
                return getattr(importlib.import_module(f"{package}.{home}"), name)
        elif home is not None:
            return home
        if name.startswith("__") and name != "__all__":  # of which Python asks any module
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        del module.__getattr__
        loader.exec_module(module)
        return getattr(module, name)

    module.__getattr__ = attribute
