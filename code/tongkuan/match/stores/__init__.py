"""Stores of embeddings by id, which find the nearest of a listing: a catalogue's own files, or a server."""
