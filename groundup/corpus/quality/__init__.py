"""What a text is like, and whether it stays: language, signals, rules, privacy, classifier, predicate."""
