"""``python -m bench gpu``: all that a GPU is needed for, in parts that fit a short loan of one.

``command`` runs the parts: `check` (is it right), `kernels` (part "time"), `steps`, `tune`,
`profile`. ``phases`` holds what runs in processes of its own: the build, compiling kernels, the
tests marked gpu, the checkers. ``sanitized``, ``warm``, ``convergence`` and ``profiled`` are such
processes; ``outcomes`` is a plugin of pytest. A part is tried out on a CPU by ``--rehearse``.
"""
