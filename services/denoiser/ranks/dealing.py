"""How the rows of a batch are dealt to the groups of ranks that compute them apart; pure arithmetic."""

from __future__ import annotations

from itertools import pairwise


def dealt(rows: int, groups: int) -> list[slice]:
    """The rows of each group: neighbours stay together, as evenly as can be, the first group first.

    With two groups and every request guided, these are the prompts' rows and the negative prompts'.
    """
    bounds = [-(-rows * group // groups) for group in range(groups + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]
