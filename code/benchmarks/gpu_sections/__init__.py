"""The sections of gpu.py: what each measures, and the table that they fill."""
