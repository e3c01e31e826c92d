"""How the processes of an attempt are started: torchrun, Ray."""
