"""What can be done from a shell: ``aiostage inspect``, ``aiostage verify``, ``aiostage bench``."""
