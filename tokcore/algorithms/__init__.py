"""Published token-level algorithms as pure functions of tensors; import the one you use."""
