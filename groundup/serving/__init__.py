"""A model in use by people and programs: an OpenAI-compatible server, and the page."""
