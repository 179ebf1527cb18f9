"""What the scripts bench_*.py share: a model and rows made on the spot, contestants in processes of
their own that take one step in turn, and the arithmetic of their times.
"""
