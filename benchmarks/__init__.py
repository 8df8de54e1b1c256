"""Measurements against xl, taken on one host in one run. ``scripts/bench`` runs them in a lab."""
