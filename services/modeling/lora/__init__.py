"""LoRAs: small changes to a network's weights, read from files of many layouts and applied to some rows of a batch.

`layouts.py` understands the names of tensors, and `kinds.py` their numbers: of a layer's tensors it makes a change in
one of the forms of `deltas.py`. `targets.py` finds the layer of ours that a change is for, and `reading.py` puts the
whole file together to an adapter (`adapter.py`). A network (`network.py`) has adapters applied beside its layers
(`branches.py`) or, if they are used much, within other weights (`fusing.py`). `library.py` holds what a stage has
loaded, `servicer.py` serves it.
"""
