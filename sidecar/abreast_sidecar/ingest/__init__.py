"""From Redis: reads ready pairs, takes over what dead workers left, gives up pairs that stay incomplete."""
