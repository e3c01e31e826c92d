"""Nodes as the controller shows them."""

from __future__ import annotations

from raylaunch.controller.ray.calls import by_name
from raylaunch.models.cluster import NodeView


def node(name: str) -> NodeView:
    return NodeView(id=name, hostname=name, address="10.0.0.1", alive=True)


def test_nodes_stand_in_the_order_of_their_names_whatever_order_ray_has_them_in() -> None:
    names = ["dgx-10", "10", "spark", "dgx-2a", "dgx-2", "2-dgx"]
    assert [one.hostname for one in by_name(map(node, names))] == ["2-dgx", "10", "dgx-2", "dgx-2a", "dgx-10", "spark"]
