"""Benchmarks: how fast every op is, beside whom, and how far from what the machine can do.

``registry`` says what is measured (inputs, exact FLOPs, least bytes), ``peers`` beside whom,
``gate`` refuses a number for a wrong result, ``timing`` takes paired A-B-A samples, ``roofline``
turns work into a floor. ``python -m bench --help`` lists the commands; docs/benchmarks.md explains
how to read a row. This folder imports tinyclip, never the reverse, and is not installed.
"""

import time

BEGUN = time.monotonic()  # before torch is imported, which is part of a budget
