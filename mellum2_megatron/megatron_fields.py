"""Old path, promised by docs/plugin.md: the module is now
`mellum2_megatron.architecture.megatron_fields`."""

from mellum2_megatron.architecture.megatron_fields import architecture_arguments

__all__ = ["architecture_arguments"]
