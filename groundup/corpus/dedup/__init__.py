"""Deduplication: which documents are removed as duplicates, and which repeated parts are cut out of the others.

Four kinds, each a step over files that fits in the memory it is given, whatever the corpus is:

    exact       equal texts, by 128-bit digest                        `repeats.exact_duplicates`
    near        most runs of five words in common, by MinHash          `near.near_duplicates`
    parts       paragraphs or lines that another document has          `repeats.repeated_parts`
    substrings  runs of so many words that stand elsewhere             `repeats.repeated_substrings`

Which document is kept is decided by content and id only, so the result does not depend on how work was divided.
"""
