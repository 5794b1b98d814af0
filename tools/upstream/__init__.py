"""Upstream releases beside the installed ones: installing, checking and testing them. Used by two scripts."""
