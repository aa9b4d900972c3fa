"""Knowing the experts of later layers early: traces of what routers saw and chose."""
