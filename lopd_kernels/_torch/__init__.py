"""The implementation in torch."""
