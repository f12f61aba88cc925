"""Ids of groups that stay what they were, whatever listings come and go.

An id goes with the part of its old group that holds the most of it; of several ids that come together the smallest
survives. A group that has none takes the smallest of its item_ids that is no group's id.
"""

from collections import Counter
from collections.abc import Sequence


def stable_ids(
    item_ids: Sequence[str], clusters: Sequence[int], before: Sequence[str | None], taken: set[str]
) -> dict[int, str]:
    """The id of each cluster of N listings; `before`: of each one's group until now, None of a new listing.

    `taken` are ids of other groups, to which no listing here has belonged.
    """
    smallest: dict[int, str] = {}
    for cluster, item_id in zip(clusters, item_ids, strict=True):
        smallest[cluster] = min(smallest.get(cluster, item_id), item_id)
    held = Counter((old, cluster) for old, cluster in zip(before, clusters, strict=True) if old is not None)
    heirs: dict[str, int] = {}
    for old, cluster in held:
        best = heirs.get(old)
        if best is None or (-held[old, cluster], smallest[cluster]) < (-held[old, best], smallest[best]):
            heirs[old] = cluster
    found: dict[int, str] = {}
    for old, cluster in heirs.items():
        found[cluster] = min(found.get(cluster, old), old)
    used = taken | set(found.values())
    members: dict[int, list[str]] = {}
    for cluster, item_id in zip(clusters, item_ids, strict=True):
        if cluster not in found:
            members.setdefault(cluster, []).append(item_id)
    for cluster in sorted(members, key=smallest.__getitem__):
        found[cluster] = free_id(sorted(members[cluster]), used)
        used.add(found[cluster])
    return found


def free_id(item_ids: Sequence[str], used: set[str]) -> str:
    """The first of a group's ids that is not used, else the first one with a number behind it."""
    for item_id in item_ids:
        if item_id not in used:
            return item_id
    number = 2
    while f"{item_ids[0]}~{number}" in used:
        number += 1
    return f"{item_ids[0]}~{number}"
