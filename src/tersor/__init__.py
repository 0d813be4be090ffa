"""Tersor."""
