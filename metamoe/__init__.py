"""Experts trained apart become one Mixture-of-Experts, without anybody's data moving.

::

    import metamoe

    run = metamoe.simulate("glyphs", progress=True)
    run.table()
    run.model.predict("digit.png").classes

What is in ``__all__`` is for users; docs/python.md shows it at work. The packages and modules beside it are not.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metamoe import audit
    from metamoe.ask import Decision, Evaluation
    from metamoe.common.config import Settings
    from metamoe.common.errors import MetaMoEError
    from metamoe.comparison import Benchmark, benchmark
    from metamoe.drift import Drift
    from metamoe.model import Continuation, Model, load
    from metamoe.predict import Prediction
    from metamoe.results import RunResults
    from metamoe.run import Run, RunEvent, open_run, resume, simulate
    from metamoe.writing import Writing
else:
    # Nothing is loaded before it is asked for: the command answers at once, and torch takes seconds.
    _PLACES = {
        "metamoe.ask": ("Decision", "Evaluation"),
        "metamoe.common.config": ("Settings",),
        "metamoe.common.errors": ("MetaMoEError",),
        "metamoe.comparison": ("Benchmark", "benchmark"),
        "metamoe.drift": ("Drift",),
        "metamoe.model": ("Continuation", "Model", "load"),
        "metamoe.predict": ("Prediction",),
        "metamoe.results": ("RunResults",),
        "metamoe.run": ("Run", "RunEvent", "open_run", "resume", "simulate"),
        "metamoe.writing": ("Writing",),
    }

    def __getattr__(name: str) -> object:
        if name == "audit":
            return import_module("metamoe.audit")
        for place, names in _PLACES.items():
            if name in names:
                return getattr(import_module(place), name)
        raise AttributeError(f"module 'metamoe' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "Benchmark",
    "Continuation",
    "Decision",
    "Drift",
    "Evaluation",
    "MetaMoEError",
    "Model",
    "Prediction",
    "Run",
    "RunEvent",
    "RunResults",
    "Settings",
    "Writing",
    "audit",
    "benchmark",
    "load",
    "open_run",
    "resume",
    "simulate",
]
