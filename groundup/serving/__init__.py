"""An engine for people and programs: an OpenAI-compatible server, and a page.

Names are imported when first used: `feedback` and `inspect` need none of the server's libraries.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from groundup.serving.app import make_app
    from groundup.serving.state import Limits, ServedModel, State

__all__ = ["Limits", "ServedModel", "State", "make_app"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'groundup.serving' has no attribute {name!r}")
    module = importlib.import_module("groundup.serving.app" if name == "make_app" else "groundup.serving.state")
    return getattr(module, name)
