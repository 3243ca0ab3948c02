"""``tinyclip demo``: TinyCLIP's claim, shown in minutes on scanned digits.

recipe.py says what is trained, runs.py trains and measures it, figures.py draws, report.py writes.
"""
