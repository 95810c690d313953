"""Packs an image folder into MindRecord shards: python -m tools.records."""
