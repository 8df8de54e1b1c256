"""xtool: a Xen toolstack that builds and runs PV, PVH and HVM domains by raw hypercalls."""

__version__ = "0.1.0"
