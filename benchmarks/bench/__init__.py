"""The instrument behind ``benchmarks/run.py``: the same small real training for every arm."""
