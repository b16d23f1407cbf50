"""What attacker and masks cover, on integers only."""
