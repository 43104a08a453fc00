"""Mellum 2 as Megatron-Core modules.

`layer_specs` puts the layers together, `attention` gives each layer its window, rotation and logit
scale, `provider` builds the model. `core_attention` and `norm` are the torch backend's own parts.

Shapes are written with the letters below, in brackets in docstrings (`[s, b, h]`) and as suffixes
of tensor names (`query_sbnd`). Numbers are those of the 12B model.

====== ========================================================= ======
letter dimension                                                   size
====== ========================================================= ======
s      positions of a sequence                                     8192
b      sequences of a micro-batch
t      tokens in one dimension: `s * b`, or a packed stream
h      hidden size                                                 2304
n      query heads                                                   32
g      groups of query heads: heads of keys and values                4
d      head dimension                                               128
i      queries of one call of the attention kernel
j      keys that these queries may see
e      routed experts                                                64
k      experts that each token is routed to                           8
v      vocabulary                                                 98304
====== ========================================================= ======

A digit is the size of a dimension (`angles_s11d`). A rank holds a share of some dimensions. Context
parallelism divides s and t (`[s / cp, b, h]`), and sequence parallelism divides them again; tensor
parallelism divides n, g and v, expert parallelism e. A docstring names the division where the code
depends on it.
"""
