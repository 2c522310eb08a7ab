"""From the large tables of others to the small ones that ship: screening, thinning, cards."""
