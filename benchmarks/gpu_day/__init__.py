"""The GPU day: what a GPU has to show about this package, in two parts of under seven minutes.

``../gpu.py`` is the command. ``steps.py`` is the table of what is run, ``driver.py`` runs it,
``place.py`` says on what, ``reader.py`` makes pages and tables of the lines that come back.
"""
