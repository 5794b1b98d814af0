"""What needs more than one process. `exchange` is for all; the sharding back ends never import each other."""
