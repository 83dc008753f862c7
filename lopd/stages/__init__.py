"""The commands of lopd: each module has a config dataclass and a `main`."""
