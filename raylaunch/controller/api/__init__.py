"""The HTTP interface of the controller."""
