"""torch.library operators `lopd::*`."""
