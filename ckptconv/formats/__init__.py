"""Bytes <-> raw trees, one file each."""
