"""Recipes that ship with the package; `trainsys recipes` lists them."""
