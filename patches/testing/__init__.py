"""Parts of the pytest plugin. Imported by the plugin alone."""
