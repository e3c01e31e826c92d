"""Train on your own GPU machines.

Importing this costs nothing: names are loaded when they are used.
"""
