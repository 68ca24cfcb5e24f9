"""What is said between machines: messages, their limits, and how bytes become typed values.

`messages` is what all of them have in common; `blobs`, `offers` and `training` are the vocabulary, one file a subject.
"""
