"""The node agent: raylaunch on each node, as a light Ray actor."""
