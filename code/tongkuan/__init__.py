"""Tongkuan (同款): do two shop listings sell the same product?"""

from pathlib import Path

__version__ = "0.1.0"
TOP = Path(__file__).resolve().parents[2]
