"""An engine for people and programs: an OpenAI-compatible server."""

from groundup.serving.app import make_app
from groundup.serving.state import Limits, ServedModel, State

__all__ = ["Limits", "ServedModel", "State", "make_app"]
