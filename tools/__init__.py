"""What developers run beside the library; not part of the wheel."""
