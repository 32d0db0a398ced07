"""A small sweep of runs, and the law L(N, D) that is fitted to it (`sweep.py` begins)."""
