"""What a run will cost, before it runs: memory, time, money, loss (`plan.py` puts the parts together)."""
