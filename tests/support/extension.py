"""Malformed calls of the extension, one after another, and what has to come of each."""

import re
import sys
from collections.abc import Iterable

from tinyclip import _extension

Change = tuple[str, dict]  # what is wrong with it, and the arguments that are put in


def try_all(calls: Iterable[tuple[str, dict, list[Change]]]) -> None:
    """Of each function a good call, then every change of it; prints what misbehaves and exits.

    A malformed call must raise TypeError, or ValueError with the argument's name.
    """
    tried = bad = 0
    for function, arguments, changes in calls:
        call = getattr(_extension.load(), function)
        call(**arguments)
        for what, change in [*changes, ("unknown", {"nonsense": 1})]:
            tried += 1
            try:
                call(**{**arguments, **change})
            except TypeError:
                continue  # pybind11's own: it lists the signature with every argument's name
            except ValueError as error:
                name = re.split(r"[.\[ ]", what)[0]
                if re.search(rf"\b{name}\b", str(error)):
                    continue
                print(f"{function}: {what}: does not name it: {error}")
            else:
                print(f"{function}: {change} went through")
            bad += 1
    print(tried, "malformed calls")
    sys.exit(bad > 0)
