"""raylaunch's verbs as tools for coding agents, over the Model Context Protocol.

A front of `raylaunch.client.client`, like the command line. raylaunch never imports it.
"""

from __future__ import annotations
