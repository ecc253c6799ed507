"""What a state means in each framework: data tables and the few functions that interpret them."""
