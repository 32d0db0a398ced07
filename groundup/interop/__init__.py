"""Ours and everybody's formats: models as folders that Hugging Face's transformers load as they stand."""

from groundup.interop.folder import LoadedModel, load, load_model, save_model

__all__ = ["LoadedModel", "load", "load_model", "save_model"]
