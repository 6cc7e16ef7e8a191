"""Worlds: where per-user data come from. The built-in one is made up; the others read real data sets."""
