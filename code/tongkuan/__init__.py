"""Tongkuan (同款): do two shop listings sell the same product?"""

__version__ = "0.1.0"
