"""The extension of Megatron's distributed Muon. Import its module once Megatron may be imported."""
