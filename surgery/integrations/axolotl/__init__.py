"""`plugins: [surgery.integrations.axolotl.SurgeryPlugin]`, in the YAML of axolotl. Importing this package needs it."""

from surgery.integrations.axolotl.plugin import SurgeryPlugin

__all__ = ["SurgeryPlugin"]
