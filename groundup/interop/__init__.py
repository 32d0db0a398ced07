"""Other programs' formats: models as folders that Hugging Face's transformers load as they stand, and GGUF."""

from groundup.interop.convert import export_folder, import_folder
from groundup.interop.folder import LoadedModel, find_model, load, load_model, save_model

__all__ = ["LoadedModel", "export_folder", "find_model", "import_folder", "load", "load_model", "save_model"]
