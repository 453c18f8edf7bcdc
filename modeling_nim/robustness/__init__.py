"""Attacks, evaluation, certificates: `from modeling_nim.robustness import attack, evaluate, certify, as_target`."""

import importlib


_PUBLIC = dict.fromkeys(("as_target", "attack", "certify", "evaluate"), "api")
_PUBLIC |= {"AttackRecipe": "recipes", "Target": "targets"}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    # torch and transformers take seconds, which a module that needs one file of this package need not wait for
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
