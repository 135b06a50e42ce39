"""Measurements of what a rank spends on its packs."""
