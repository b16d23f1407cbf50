"""Figures for a paper, and pictures of masks."""
