"""Settings: dataclass fields, YAML and command-line flags."""
