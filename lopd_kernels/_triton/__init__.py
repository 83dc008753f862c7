"""The implementation in Triton; nothing here is imported before a tensor needs it."""
