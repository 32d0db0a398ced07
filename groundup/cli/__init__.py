"""The command line: thin over the importable API."""
