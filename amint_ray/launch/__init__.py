"""Launch: the one room that knows Ray."""
