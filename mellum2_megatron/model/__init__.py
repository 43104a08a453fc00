"""Mellum 2 as Megatron-Core modules: layer specs, layer-selective attention, the torch backend's
own parts."""
