"""The life of a weight: packed once, kept as a ``QuantizedWeight``, saved, loaded, cut into shards."""
