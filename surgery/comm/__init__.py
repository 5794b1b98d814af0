"""Ranks of a job: who they are, what they send each other, and how the failure of one ends all."""
