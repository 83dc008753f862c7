"""Transformers models: loading, the LM head, packing, adapters, FLOPs."""
