"""The recipes that ship with groundup, as data."""
