"""Old path of `mellum2_megatron.architecture.megatron_fields`, shown by earlier pages."""

from mellum2_megatron.architecture.megatron_fields import architecture_arguments

__all__ = ["architecture_arguments"]
