"""Files of a merged model: a directory that appears whole or not at all, its shards, its manifest, and the base model it names.

``stream.DeltaWriter`` writes the file.
"""
