"""A whole catalogue: which of its listings are the same product?"""
