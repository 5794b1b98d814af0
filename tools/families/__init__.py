"""The sweep over model families: tiny configs, random checkpoints, both loaders side by side, the page of results."""
