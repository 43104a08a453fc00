"""Text to training-ready tokens.

``corpus`` chooses the documents, ``tokenizer`` and ``encode`` turn them into ids, ``prepare``
writes the folder, and ``datasets`` is Megatron's view of it.
"""
