"""Readers of other systems' quantised checkpoints; none of their packages is imported.

A reader is a file here and a row of ``table.py``. It takes what a file holds of one module
(``module.py``) and the file's settings, and gives the weight in a neutral form (``neutral.py``):
integers with scales, codes with a codebook, or plain values. ``storing.py`` keeps that as a
``QuantizedWeight``, ``loading.py`` reads those for a model.
"""
