"""Which layers an engine computes wrongly: searched for by leaving layers in float."""

from __future__ import annotations

from collections.abc import Callable, Sequence

IsRight = Callable[[frozenset[str]], bool]


def layers_at_fault(layer_names: Sequence[str], is_right: IsRight) -> tuple[str, ...] | None:
    """The smallest set that this search finds of layers to leave in float so that the engine is
    right, in the order of `layer_names`; None where it is wrong with all of them in float.

    `layer_names` stand in the order of computing; `is_right(float_layers)` builds, runs and judges
    the model with these left in float. First the shortest run of layers from the beginning, from
    the end and between the two is found by bisection; then layers are taken out of it in ever
    smaller pieces, until none can be taken out alone (delta debugging: Zeller and Hildebrandt 2002,
    "Simplifying and isolating failure-inducing input", IEEE Transactions on Software Engineering
    28:183-200, algorithm ddmin). Only the answer is asked about twice.

    Only the length of the search rests on more float layers doing no harm; an answer is always one
    for which `is_right` was true, and true again when asked once more at the end.
    """
    names = list(dict.fromkeys(layer_names))
    known: dict[frozenset[str], bool] = {}

    def right(chosen: Sequence[str]) -> bool:
        key = frozenset(chosen)
        if key not in known:
            known[key] = is_right(key)
        return known[key]

    if right([]):
        found: list[str] = []
    elif right(names):
        found = _shrunk(_shortest_run(names, right), right)
    else:
        return None
    # An answer that was right by chance gives way to the safest one.
    for answer in (found, names):
        if is_right(frozenset(answer)):
            return tuple(answer)
    return None


def _shortest_run(names: list[str], right: Callable[[Sequence[str]], bool]) -> list[str]:
    """A run of neighbouring layers that is right; `names` is."""
    end = _least(len(names), lambda count: right(names[:count]))
    if end == 1:
        return names[:1]
    start = len(names) - _least(len(names), lambda count: right(names[len(names) - count :]))
    runs = [names[:end], names[start:], names[start:end]]
    return min((run for run in runs if right(run)), key=len)


def _least(most: int, right: Callable[[int], bool]) -> int:
    """By bisection a count that is right and whose predecessor is wrong; `most` is right, 0 wrong."""
    wrong, least = 0, most
    while least - wrong > 1:
        middle = (wrong + least) // 2
        wrong, least = (wrong, middle) if right(middle) else (middle, least)
    return least


def _shrunk(names: list[str], right: Callable[[Sequence[str]], bool]) -> list[str]:
    """`names` without what can be taken out, piece by piece, while it stays right."""
    pieces = 2
    while len(names) > 1:
        size = -(-len(names) // pieces)
        for start in range(0, len(names), size):
            rest = names[:start] + names[start + size :]
            if right(rest):
                names, pieces = rest, max(2, pieces - 1)
                break
        else:
            if size == 1:
                break
            pieces = min(len(names), 2 * pieces)
    return names
