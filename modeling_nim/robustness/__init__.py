"""Robustness: threat models, attacks, noise draws, statistics, certification, records and figures."""
