"""Parts of the upstream scripts: other releases of upstream libraries, installed, checked and tested."""
