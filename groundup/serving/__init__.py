"""An engine for people and programs: an OpenAI-compatible server (`app`), its page, feedback, and a look inside."""
