"""Student policies that generate."""
