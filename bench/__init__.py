"""Microbenchmarks of the ops; installed as kernomics.bench."""
