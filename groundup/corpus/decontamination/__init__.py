"""Evaluation data that stands in the texts: read, indexed by runs of words, and found again."""
