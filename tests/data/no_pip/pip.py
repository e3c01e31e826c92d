"""In front of the real one: a machine whose Pythons have no pip."""

msg = "this machine has no pip"
raise ImportError(msg)
