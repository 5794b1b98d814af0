"""Diagnosis of a training script: its settings, what stock libraries would do with them, and which patches act."""
