"""Memory of the host, and disks."""
