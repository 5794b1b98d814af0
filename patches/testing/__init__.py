"""Patches in test suites: what the pytest plugin is made of. Nothing but the plugin imports it."""
