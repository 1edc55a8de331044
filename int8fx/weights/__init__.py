"""The life of a weight: packed once, kept as an ``Int8Weight``, saved, loaded, cut into shards."""
