"""Adapters of PEFT: checked, attached, drawn, and saved."""
