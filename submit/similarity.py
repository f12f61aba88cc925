"""The judges' contract: a pair is the same product when compute(...) is greater than its threshold.

An embedding is [p ; q], p of the threshold tower and q of the commodity tower. Standard library only.
"""

from math import fsum


def compute(item_emb_1: list, item_emb_2: list) -> float:
    """q_1.q_2 - p_1.p_2. Exactly rounded, so neither side nor the order of addition matters."""
    half = len(item_emb_1) // 2
    products = [a * b for a, b in zip(item_emb_1, item_emb_2, strict=True)]
    return fsum(products[half:] + [-product for product in products[:half]])
