"""``python -m bench gpu``: everything that needs a GPU, in parts of at most 280 seconds.

``command`` is the entry point and runs the parts: `check`, `kernels` (part "time"), `steps`,
`tune` and `profile`. ``phases`` starts child processes with deadlines: the build, kernel
compilation, the tests marked gpu, compute-sanitizer. ``sanitized``, ``warm``, ``convergence`` and
``launched`` are modules that run in such a process; ``outcomes`` is a pytest plugin. ``--rehearse``
runs a part on a CPU.
"""
