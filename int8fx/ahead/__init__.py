"""Models compiled ahead of time: folders that ``int8fx compile`` writes and ``int8fx run`` reads.

``trace.py`` and ``compile.py`` make one. The other modules run one, and import neither torch nor
transformers, since that takes longer than the first token may.
"""
