"""Input files: prompts, demonstrations and scores that other tools dumped."""
