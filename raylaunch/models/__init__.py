"""Requests (specs) and observations (views, states). The same models are the wire format."""
