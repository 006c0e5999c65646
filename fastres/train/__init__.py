"""Training from the command line: `python -m fastres train` (see `options.py` for what it takes).

Read in this order: `run.py` (what the command does), `engine.py` (the loop and one training step), `data.py` (batches
as a function of seed, epoch and step), `checkpoint.py`, `compare.py` (stock against fused) and `report.py`.
Importing this package imports nothing beyond itself.
"""
