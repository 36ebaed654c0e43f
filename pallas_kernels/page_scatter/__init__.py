"""Adds gradients of groups of rows to a pool of adapter pages."""

from pallas_kernels.page_scatter.api import scatter_add_pages

__all__ = ["scatter_add_pages"]
