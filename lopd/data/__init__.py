"""Input files (prompts, demonstrations, other tools' scores); which row predicts which token."""
