"""Measures the sensors' tolerances on a device: the table that ships is its output, as a machine's own table is."""
