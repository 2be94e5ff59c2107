"""What a run will need, before it runs: parameters, memory, traffic, time and layouts.

The model of each rank is built without storage (meta device), turned into its parallel form as in a run, and goes
through one micro-batch: ``paper.py`` makes such a rank, ``trace.py`` counts what its passes keep, compute and send.
``memory.py`` and ``cost.py`` put that together over the pipeline's schedule; ``search.py`` compares layouts.
"""
