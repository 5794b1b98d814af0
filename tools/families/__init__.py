"""Sweep over model families: tiny configs, random checkpoints, both loaders side by side, and the results page."""
