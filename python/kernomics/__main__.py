"""``python -m kernomics``: the ``kernomics`` command."""

from kernomics.cli import app

app()
