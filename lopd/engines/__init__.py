"""Engines that generate and score, behind the protocol of `lopd.engines.base`."""
