"""Strong and weak scaling: measured by the ranks that are there, gathered into a table afterwards."""
